"""A headless Chromium, driven over its debugging pipe."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

CHROMIUM = shutil.which("chromium")
_SIZE = "--window-size=1360,2600"


class Browser:
    """One page of a browser. `problems` are the console's errors and warnings, exceptions and what was not loaded;
    `requests` the addresses that were asked for."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        commands, self._out = os.pipe()
        answers, taken = os.pipe()
        options = f"--headless=new --no-sandbox --disable-gpu --remote-debugging-pipe {_SIZE} --user-data-dir={profile}"
        shell = f"exec {CHROMIUM} {options} about:blank 3<&{commands} 4>&{taken}"
        self._process = subprocess.Popen(
            ["/bin/bash", "-c", shell], pass_fds=(commands, taken), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(commands)
        os.close(taken)
        self._in, self._count, self._session = os.fdopen(answers, "rb"), 0, ""
        self._rest, self._events = b"", []
        self.problems: list[str] = []
        self.requests: list[str] = []
        pages = [page for page in self.ask("Target.getTargets")["targetInfos"] if page["type"] == "page"]
        attach = {"targetId": pages[0]["targetId"], "flatten": True}
        self._session = self.ask("Target.attachToTarget", **attach)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        self.ask("Performance.enable", timeDomain="threadTicks")

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._out)  # it ends when nobody can tell it anything
        self._in.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def open(self, page: Path) -> float:
        """Loads a page; gives the seconds of a core that its main thread took until all of it was there."""
        self._events.clear()
        self.ask("Page.navigate", url=page.resolve().as_uri())
        while "Page.loadEventFired" not in self._events:
            self._hear(self._receive())
        return self._main_thread()

    def evaluate(self, script: str) -> Any:
        """What a script's last expression comes to."""
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def point(self, x: float, y: float) -> None:
        """Moves the pointer."""
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the DevTools protocol, and its answer."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            heard = self._receive()
            if heard.get("id") == self._count:
                assert "error" not in heard, heard
                return heard["result"]
            self._hear(heard)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = self._in.read1(1 << 16)
            assert more, "the browser has ended"
            self._rest += more
        first, _, self._rest = self._rest.partition(b"\0")
        return json.loads(first)

    def _hear(self, event: dict[str, Any]) -> None:
        method, params = event.get("method", ""), event.get("params", {})
        self._events.append(method)
        if method == "Runtime.exceptionThrown":
            self.problems.append(str(params["exceptionDetails"])[:500])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.problems.append(f"{params['type']}: {params['args']}"[:500])
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def _main_thread(self) -> float:
        """It counts from the begin of a page."""
        found = {metric["name"]: metric["value"] for metric in self.ask("Performance.getMetrics")["metrics"]}
        return found["TaskDuration"]
