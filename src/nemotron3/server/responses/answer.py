"""The response to items, complete or as a stream of events."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from nemotron3.inference.output_processor import RequestOutput
from nemotron3.inference.requests import FinishReason
from nemotron3.server.generation.prompts import ChatPlan
from nemotron3.server.generation.serving import RequestHandle, ServingContext, new_id
from nemotron3.server.generation.token_ids import token_fields
from nemotron3.server.generation.usage import usage_of
from nemotron3.server.http.errors import APIError
from nemotron3.server.http.streaming import event
from nemotron3.server.responses.body import LOGPROBS, NamedFunctionTool, ResponsesBody
from nemotron3.server.responses.events import ItemEvents
from nemotron3.server.responses.items import Item, output_items
from nemotron3.server.responses.store import ResponseStore


class ResponseAnswer:
    """One request's answer, complete or as a stream of events."""

    def __init__(
        self,
        serving: ServingContext,
        body: ResponsesBody,
        plan: ChatPlan,
        items: list[Item],
        handle: RequestHandle,
        store: ResponseStore,
    ) -> None:
        self._serving = serving
        self._body = body
        self._plan = plan
        self._items = items
        self._handle = handle
        self._store = store
        self._with_logprobs = LOGPROBS in (body.include or ())
        self._response_id = new_id("resp")
        self._created = int(time.time())

    async def whole(self) -> dict[str, Any]:
        """The answer's JSON."""
        output = await self._handle.whole()
        said = output_items(
            self._serving.llm.tokenizer,
            output.outputs[0],
            is_single=self._plan.is_single_call,
            with_logprobs=self._with_logprobs,
        )
        said[-1] |= self._token_fields(output)
        return self._finished(output, said)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The events of the answer, from `response.created` to the final status."""
        number = 0

        def numbered(kind: str, fields: dict[str, Any]) -> bytes:
            nonlocal number
            number += 1
            return event({"type": kind, "sequence_number": number - 1, **fields}, kind)

        for kind in ("response.created", "response.in_progress"):
            yield numbered(kind, {"response": self._body_so_far("in_progress", [])})
        items = ItemEvents(
            self._serving.llm.tokenizer,
            is_single=self._plan.is_single_call,
            with_logprobs=self._with_logprobs,
        )
        try:
            async with aclosing(self._handle.deltas()) as deltas:
                async for delta in deltas:
                    for kind, fields in items.push(delta):
                        yield numbered(kind, fields)
        except APIError as error:
            code = "invalid_prompt" if error.status == 400 else "server_error"  # OpenAI's codes
            failure = {"code": code, "message": error.message}
            body = self._body_so_far("failed", items.items) | {"error": failure}
            yield numbered("response.failed", {"response": body})
            return
        output = self._handle.output()
        is_whole = output.outputs[0].finish_reason is FinishReason.STOP
        of_turn = self._token_fields(output)
        for kind, fields in items.finish(is_whole=is_whole, token_fields=of_turn):
            yield numbered(kind, fields)
        body = self._finished(output, items.items)
        yield numbered(f"response.{body['status']}", {"response": body})

    def _finished(self, output: RequestOutput, said: list[Item]) -> dict[str, Any]:
        is_whole = output.outputs[0].finish_reason is FinishReason.STOP
        body = self._body_so_far("completed" if is_whole else "incomplete", said)
        body["usage"] = usage_of(output).responses_body()
        body["completed_at"] = int(time.time()) if is_whole else None
        if not is_whole:
            body["incomplete_details"] = {"reason": "max_output_tokens"}
        if self._body.store is not False:
            self._store.put(body, [*self._items, *said])
        return body

    def _token_fields(self, output: RequestOutput) -> Item:
        """What the last item of the turn has for training."""
        if not self._body.returns_ids:
            return {}
        with_routes = self._body.return_routed_experts
        return token_fields(output.prompt, output.outputs[0], with_routes=with_routes)

    def _body_so_far(self, status: str, items: list[Item]) -> dict[str, Any]:
        asked = self._body
        params = self._plan.params
        choice = asked.tool_choice
        return {
            "id": self._response_id,
            "object": "response",
            "created_at": self._created,
            "completed_at": None,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": self._serving.model_name,
            "output": items,
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": asked.previous_response_id,
            "reasoning": {
                "effort": asked.reasoning.effort if asked.reasoning is not None else None,
                "summary": None,
            },
            "service_tier": "default",
            "store": asked.store is not False,
            "temperature": params.temperature,
            "text": self._text(),
            "tool_choice": choice.model_dump()
            if isinstance(choice, NamedFunctionTool)
            else choice or "auto",
            "tools": asked.tools or [],
            "top_logprobs": asked.top_logprobs or 0,
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": asked.user,
            "background": False,
        }

    def _text(self) -> dict[str, Any]:
        text_format = self._body.text.format if self._body.text is not None else None
        if text_format is None:
            return {"format": {"type": "text"}}
        return {"format": text_format.model_dump(by_alias=True, exclude_none=True)}
