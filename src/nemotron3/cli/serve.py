"""`nemotron3 serve`: a model over HTTP, with OpenAI's API."""

import argparse
import ipaddress
import logging
import os

from nemotron3.cli.engine_options import load_engines, named_adapters
from nemotron3.errors import ConfigError, DependencyMissingError

_KEY_VARIABLE = "NEMOTRON3_API_KEY"
_MIB = 2**20


def serve_command(known: argparse.Namespace) -> int:
    """Load a model and serve it until SIGTERM or Ctrl-C."""
    try:
        from nemotron3.inference.base_llm import name_of
        from nemotron3.server.app import ServerSettings, check_adapters, create_app
        from nemotron3.server.http.logs import written_logs
        from nemotron3.server.running import bind, serve
    except ImportError as error:
        raise DependencyMissingError(
            f"the server needs {error.name}, which is not installed: pip install 'nemotron3[serve]'"
        ) from error
    key = known.api_key or os.environ.get(_KEY_VARIABLE) or None
    if known.max_body_mib < 1:
        raise ConfigError(f"--max-body-mib is {known.max_body_mib}; it must be 1 or more")
    if known.enable_weight_updates is not None and key is None:
        raise ConfigError(
            f"--enable-weight-updates lets clients replace the model, so it takes a key; set "
            f"{_KEY_VARIABLE}"
        )
    name = known.served_model_name or name_of(known.path)
    settings = ServerSettings(
        served_model_name=name,
        api_key=key,
        max_body_bytes=known.max_body_mib * _MIB,
        allowed_origins=tuple(filter(None, map(str.strip, known.allowed_origins.split(",")))),
        reasoning_grace=known.reasoning_grace,
        weights_folder=known.enable_weight_updates,
    )
    check_adapters(name, settings, named_adapters(known.lora or ()))
    log = logging.getLogger("nemotron3.server")
    with written_logs(known.log_format), bind(known.host, known.port) as bound:
        if key is None and not is_loopback(known.host):
            log.warning(
                "anyone who reaches %s can use this server; set %s to ask for a key",
                known.host,
                _KEY_VARIABLE,
            )
        if key is None and "*" in settings.allowed_origins:
            log.warning(
                "every page that a browser on this network opens can use this server; set %s, or "
                "name the pages in --allowed-origins",
                _KEY_VARIABLE,
            )
        served = load_engines(known)
        llm = served.base
        try:
            llm.prepare_grammars()
        except DependencyMissingError as error:
            log.warning("structured outputs will be refused: %s", error)
        if defaults := llm.defaults.described():
            log.info("the model's generation_config.json gives defaults: %s", defaults)
        server = create_app(llm, settings, served.adapters)
        for each, adapter in served.adapters.items():
            log.info(
                "%s: %s, with %.1f MiB of weights of its own beside the model's",
                each,
                adapter.directory,
                adapter.merged_bytes / _MIB,
            )
        address = f"http://{known.host}:{bound.getsockname()[1]}"
        log.info(
            "%s, %s tokens of context: chat at %s/ and clients at %s/v1",
            name,
            f"{llm.max_model_len:,}",
            address,
            address,
        )
        serve(server, bound, drain_timeout_s=known.drain_timeout)
    return 0


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
