"""One HTML file that shows rollouts: the prompts, the model's answers, and their rewards.

It is generated from `rollouts.jsonl`, one record per line, without scripts and network access.
Rollouts of the same prompt are side by side, the best first. All text is escaped, since a model's
output is untrusted.

    write_rollouts_page(run_dir / "rollouts.jsonl", title="tiny-rl")
"""

import html
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from nemotron3.observe.json_lines import read_lines

PAGE_FILE = "rollouts.html"
_MOST_PROMPTS = 3
"""Most prompts of an environment that are shown for each moment of training."""
_MOST_REASONS = 3
"""Most reasons of failures that stand at its head."""
_MOST_MOMENTS = 12
"""Most moments of training that are shown: the first, the last, and others evenly between."""

Record = Mapping[str, Any]
"""`when` (a label such as "step 10"), `environment`, `prompt`, `messages` (OpenAI's, with the
prompt's), `reward`, `components`, `shaping`, `advantage`, `penalties` (objects with `turn`,
`advantage`, `why`), `failure`, `tokens`, `is_cut`."""


def write_rollouts_page(records_file: Path, *, title: str) -> Path | None:
    """Write `rollouts.html` in the folder of the records; returns None if there are none."""
    records: list[Record] = list(read_lines(records_file))
    if not records:
        return None
    path = records_file.with_name(PAGE_FILE)
    partial = path.with_suffix(".html.tmp")
    partial.write_text(rollouts_page(records, title=title), encoding="utf-8")
    partial.replace(path)
    return path


def rollouts_page(records: Sequence[Record], *, title: str) -> str:
    """The page of some rollouts, by environment, then in the order of the records."""
    environments = _grouped(records, "environment")
    links = " ".join(
        f'<a href="#{html.escape(name)}">{html.escape(name)}</a>' for name in environments
    )
    sections = "".join(_environment(name, own) for name, own in environments.items())
    style = "".join(
        resources.files("nemotron3.observe").joinpath(name).read_text(encoding="utf-8")
        for name in ("report.css", "rollouts.css")
    )
    heading = html.escape(f"Rollouts: {title}")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{heading}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f"<header><h1>{heading}</h1><p>Rollouts of the same prompt stand side by side, best first. "
        f"A badge is the reward; its parts and the advantage stand beside it.</p>"
        f"<nav>{links}</nav></header>\n{sections}</main>\n</body>\n</html>\n"
    )


def _grouped(records: Sequence[Record], key: str) -> dict[Any, list[Record]]:
    found: dict[Any, list[Record]] = {}
    for record in records:
        found.setdefault(record[key], []).append(record)
    return found


def _environment(name: str, records: Sequence[Record]) -> str:
    moments = _spread(list(_grouped(records, "when").items()), _MOST_MOMENTS)
    parts = "".join(
        _moment(when, own, is_open=number in (0, len(moments) - 1))
        for number, (when, own) in enumerate(moments)
    )
    return f'<section id="{html.escape(name)}"><h2>{html.escape(name)}</h2>{parts}</section>\n'


def _spread(items: list[Any], most: int) -> list[Any]:
    """At most `most` items at equal distances, including the first and the last."""
    if len(items) <= most:
        return items
    places = sorted({round(i * (len(items) - 1) / (most - 1)) for i in range(most)})
    return [items[place] for place in places]


def _moment(when: str, records: Sequence[Record], *, is_open: bool) -> str:
    rewards = [record["reward"] for record in records if record["reward"] is not None]
    mean = f"mean reward {sum(rewards) / len(rewards):.2f}" if rewards else "no reward"
    failures = [record["failure"] for record in records if record["failure"]]
    groups = list(_grouped(records, "prompt").values())
    singles = all(len(group) == 1 for group in groups)
    most = 4 * _MOST_PROMPTS if singles else _MOST_PROMPTS
    body = "".join(_group(group) for group in groups[:most])
    failed = f", {len(failures)} failed" if failures else ""
    head = f"{html.escape(when)} <span>{mean} of {len(records)} rollouts{failed}</span>"
    reasons = "".join(
        f'<p class="failed"><b>{count} failed:</b> {html.escape(reason)}</p>'
        for reason, count in Counter(failures).most_common(_MOST_REASONS)
    )
    opened = " open" if is_open else ""
    holder = "singles" if singles else "groups"
    return (
        f"<details{opened}><summary>{head}</summary>{reasons}"
        f'<div class="{holder}">{body}</div></details>'
    )


def _group(records: Sequence[Record]) -> str:
    """The prompt once, then each rollout."""
    prompt = _prompt_of(records[0])
    ordered = sorted(records, key=lambda r: -1e9 if r["reward"] is None else r["reward"])
    cards = "".join(_card(record) for record in reversed(ordered))
    said = "".join(_message(message) for message in prompt)
    return (
        f'<div class="group"><div class="prompt">{said}</div><div class="cards">{cards}</div></div>'
    )


def _prompt_of(record: Record) -> list[Any]:
    """The messages before the model's first one."""
    messages = record["messages"]
    first = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), len(messages))
    return messages[:first]


def _card(record: Record) -> str:
    answered = record["messages"][len(_prompt_of(record)) :]
    penalties = {each["turn"]: each for each in record.get("penalties", ())}
    body, turn = "", -1
    for message in answered:
        body += _message(message)
        turn += message["role"] == "assistant"
        if message["role"] == "assistant" and (penalty := penalties.get(turn)):
            words = html.escape(f"this turn: advantage {penalty['advantage']:+g}, {penalty['why']}")
            body += f'<p class="penalty">{words}</p>'
    return f'<div class="rollout">{_verdict(record)}{body or "<p><em>nothing</em></p>"}</div>'


def _verdict(record: Record) -> str:
    reward = record["reward"]
    if reward is None:
        why = html.escape(record["failure"] or "not judged")
        return f'<p class="verdict"><b class="none">failed</b> {why}</p>'
    kind = "good" if reward >= 1 else "part" if reward > 0 else "bad"
    parts = [f"{name} {value:g}" for name, value in record["components"].items()]
    if record.get("advantage") is not None:
        parts.append(f"advantage {record['advantage']:+.2f}")
    parts.append(f"{record['tokens']} tokens")
    if record["is_cut"]:
        parts.append("cut off")
    words = html.escape(" · ".join(parts))
    verdict = f'<p class="verdict"><b class="{kind}">{reward:g}</b> {words}</p>'
    if record.get("shaping"):
        verdict += f'<p class="penalty">{html.escape("shaped: " + record["shaping"])}</p>'
    return verdict


def _message(message: Mapping[str, Any]) -> str:
    lines: list[str] = []
    if message.get("reasoning_content"):
        lines.append(f'<p class="thought">{html.escape(message["reasoning_content"].strip())}</p>')
    if message.get("content"):
        lines.append(f'<p class="{message["role"]}">{html.escape(message["content"])}</p>')
    for call in message.get("tool_calls", ()):
        function = call["function"]
        words = html.escape(f"{function['name']}({json.dumps(function['arguments'])})")
        lines.append(f'<p class="call">{words}</p>')
    return "".join(lines)
