"""Flower app of the server: runs a configuration over the sites, which are Flower's nodes.

The run configuration has `config`, the configuration file, and `out`, the run folder. Relative paths are below the server's
folder ($WARMFED_SERVER, or the working directory).
"""

import os
import secrets
from collections import abc
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..config import Config, parse
from ..core import Round, ServerState
from ..core.messages import encode
from ..data import FederationInfo
from ..runs.backend import SITES, Backend, Execution
from ..runs.console import LineReporter
from ..runs.execute import proceed
from ..runs.prepare import PreparedRun, prepare
from ..transports import flower
from ..transports.protocol import HELLO, REFUSED, Refusal, Request, SiteInfo, check_site_info, opened
from ..transports.remote import Remote
from ..utils.errors import InputError
from ..utils.files import read_json, write_json
from ..utils.paths import exists
from .keys import openssh, registered
from .site import agree, roster


@dataclass
class FlowerBackend(Backend):
    """Backend of a deployment: the sites are Flower's nodes."""

    connect: Callable[[flower.Handshake], flower.FlowerChannel]
    folder: Path
    home: Path
    """The server's folder."""
    _channel: flower.FlowerChannel | None = field(default=None, init=False)
    _run: str = ""
    _sites: tuple[str, ...] = ()
    _infos: dict[str, SiteInfo] = field(default_factory=dict)
    _rows: dict[str, Mapping[str, int]] = field(default_factory=dict)
    """Rows that each site declared first; a site that reconnects cannot declare more."""

    def prepare(self, config: Config) -> PreparedRun:
        kept = self.folder / "checkpoint" / SITES
        begun = read_json(kept, "the run's sites") if exists(kept) else None
        self._run = begun["run"] if begun else secrets.token_hex(8)
        self._rows = {site: rows for site, rows in begun["roster"]["rows"].items() if any(rows.values())} if begun else {}
        asked = Request(self._run, "", config.toml(), HELLO, 0, 0, None)
        names_of = self._registered()
        self._channel = self.connect(
            flower.Handshake(
                name_of=lambda key: names_of.get(openssh(key)),
                introduce=lambda site, data: self._introduced(asked, site, data, config.server.max_rows),
                hello=encode(asked),
                refusal=lambda reason: encode(replace(asked, stage=REFUSED, body=Refusal(reason))),
            )
        )
        names = begun["sites"] if begun else config.server.sites
        needed = config.server.needed(len(names)) if names else config.server.min_sites
        found = self._channel.present(names, needed, config.server.stage_timeout)
        self._sites = tuple(sorted({*names, *found}))
        try:
            return self._agreed(config, _roster(begun["roster"]) if begun else roster(self._infos, self._sites))
        except InputError as error:
            self._channel.tell(f"the run is not started: {error}")
            raise

    def _registered(self) -> dict[bytes, str]:
        """Return the names of the sites by public key, from nodes/ in the server's folder."""
        found = registered(self.home / "nodes")
        if not found:
            raise InputError(
                f"{self.home / 'nodes'} has no public key of a site, so that no site can be authenticated; "
                "create the server's folder with `warmfed deploy init`"
            )
        return found

    def _agreed(self, config: Config, known: FederationInfo) -> PreparedRun:
        """Return the prepared run; raise `InputError` if the server's base or start differs from the sites'."""
        prepared = prepare(config, known)
        site, info = next(iter(sorted(self._infos.items())))
        for what, here, there in (("base", prepared.base, info.base), ("start", prepared.start, info.start)):
            if here != there:
                raise InputError(f"the server's {what} is {here!r}, that of site {site!r} {there!r}; they must be equal")
        return prepared

    def _introduced(self, asked: Request, site: str, data: bytes, most: int) -> None:
        """Record the description in a site's answer to hello; raise `InputError` if the site does not take part.

        Args:
            asked: the request.
            site: name of the site.
            data: bytes of the answer.
            most: largest number of rows over all splits; 0: no limit.
        """
        info = opened(data, asked, site, SiteInfo).body
        check_site_info(info, most)
        if self._sites and site not in self._sites:
            raise InputError(f"site {site!r} is not among {', '.join(self._sites)}")
        if self._infos and self._sites:
            first = min(self._infos)
            agree(info, site, self._infos[first], first)
        self._infos[site] = info
        self._rows.setdefault(site, {split: int(count) for split, count in info.rows.items()})

    def rounds(self, execution: Execution) -> abc.Generator[Round, None, None]:
        known = execution.prepared.federation
        assert isinstance(known, FederationInfo)
        sites = {"run": self._run, "sites": self._sites, "roster": asdict(known)}
        write_json(execution.folder / "checkpoint" / SITES, sites)
        yield from execution.over(self._transport(execution.prepared.config), self._rows)

    def finish(self, prepared: PreparedRun, folder: Path, server: ServerState) -> tuple[dict[str, str], float | None]:
        algorithm = prepared.config.method
        down = {site: algorithm.broadcast(server, site) for site in self._sites}
        return self._transport(prepared.config).finish(down, algorithm.global_model(server)), None

    def _transport(self, config: Config) -> Remote:
        assert self._channel is not None, "prepare has connected it"
        return Remote(self._channel, self._sites, self._run, config.toml(), config.server)


def _roster(table: Mapping[str, Any]) -> FederationInfo:
    shape = tuple(int(n) for n in table["shape"])
    return FederationInfo(**{**table, "classes": tuple(table["classes"]), "shape": shape})


def serve(
    connect: Callable[[flower.Handshake], flower.FlowerChannel], settings: Mapping[str, Any], home: Path | None = None
) -> None:
    """Run a configuration into its folder, or finish the run in that folder.

    Args:
        channel: channel to the sites.
        settings: Flower's run configuration.
        home: the server's folder. Default None: $WARMFED_SERVER, or the working directory.
    """
    home = home or Path(os.environ.get("WARMFED_SERVER", "."))
    config = parse(home / str(settings["config"])) if settings.get("config") else parse()
    folder = home / (str(settings.get("out") or "") or f"runs/{config.name}-{config.seed}")
    torch.set_num_threads(1)  # sums depend on the number of threads
    with LineReporter() as reporter:
        proceed(config, folder, reporter, FlowerBackend(connect, folder, home))


app = flower.server_app(serve)
