"""`nemotron3 serve`: a model behind HTTP, in OpenAI's shapes."""

import argparse
import ipaddress
import logging
import os

from nemotron3.cli.engine_options import load_engine
from nemotron3.errors import ConfigError, DependencyMissingError

_KEY_VARIABLE = "NEMOTRON3_API_KEY"
_MIB = 2**20


def serve_command(known: argparse.Namespace) -> int:
    """Load a model and serve it until SIGTERM or Ctrl-C."""
    try:
        from nemotron3.server.app import ServerSettings, create_app
        from nemotron3.server.logs import write_logs
        from nemotron3.server.running import serve
    except ImportError as error:
        raise DependencyMissingError(
            f"the server needs {error.name}, which is not installed: pip install 'nemotron3[serve]'"
        ) from error
    key = known.api_key or os.environ.get(_KEY_VARIABLE) or None
    if known.max_body_mib < 1:
        raise ConfigError(f"--max-body-mib is {known.max_body_mib}; it must be 1 or more")
    write_logs(known.log_format)
    settings = ServerSettings(
        served_model_name=known.served_model_name,
        api_key=key,
        max_body_bytes=known.max_body_mib * _MIB,
    )
    log = logging.getLogger("nemotron3.server")
    if key is None and not _is_loopback(known.host):
        log.warning(
            "anyone who reaches %s can use this server; set %s to ask for a key",
            known.host,
            _KEY_VARIABLE,
        )
    llm = load_engine(known)
    server = create_app(llm, settings)
    log.info(
        "%s, %s tokens of context: chat at http://%s:%d/ and clients at http://%s:%d/v1",
        settings.served_model_name or llm.model_name,
        f"{llm.max_model_len:,}",
        *(known.host, known.port) * 2,
    )
    serve(server, host=known.host, port=known.port, drain_timeout_s=known.drain_timeout)
    return 0


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
