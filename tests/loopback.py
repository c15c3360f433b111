"""Flower's Grid in memory: the client app processes each message at once, with the node's own configuration."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from warmfed.deploy import keys

TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


@dataclass
class Loopback(Grid):
    """Nodes by number, each with the folder of its site; `tamper(node, message, reply)` may change what comes back."""

    app: ClientApp
    folders: Mapping[int, Path]
    tamper: Callable[[int, Message, Message], Message | None] = lambda node, message, reply: reply
    replies: dict[str, Message] = field(default_factory=dict)
    count: int = 0

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return SimpleNamespace(run_id=1)

    def create_message(self, *args: Any, **options: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.folders)

    def get_nodes(self) -> Iterable[Any]:
        return [
            SimpleNamespace(node_id=node, last_activated_at="", public_key=keys.pem((folder / "node.pub").read_bytes()))
            for node, folder in self.folders.items()
        ]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            self.count += 1
            node, number = message.metadata.dst_node_id, f"message-{self.count}"
            message.metadata.__dict__["_message_id"] = number
            context = Context(1, node, {"site-folder": str(self.folders[node])}, RecordDict(), {})
            try:
                reply: Message | None = self.app(message, context)
            except Exception as error:  # as Flower's runtime does
                reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(error)), reply_to=message)
            reply = self.tamper(node, message, reply)
            if reply is not None:
                self.replies[number] = reply
            ids.append(number)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.replies.pop(number) for number in list(message_ids) if number in self.replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError
