"""A headless Chromium, driven over two pipes by the protocol of its developer tools."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import time
from contextlib import suppress
from select import select

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_SECONDS = 40.0  # for an answer

# What a page tells about how it looks.  Its own policy runs no script, but the tools may.
_MEASURE = """(() => {
  const seen = element => {
    const box = element.getBoundingClientRect();
    return box.width > 0 && box.height > 0;
  };
  const all = name => [...document.querySelectorAll(name)];
  return {
    width: document.documentElement.scrollWidth,
    height: document.documentElement.scrollHeight,
    headings: all("h2").filter(seen).map(element => element.id),
    pictures: all("[role=img]").length,
    shown: all("[role=img] > svg, [role=img] > img").filter(seen).length,
    images: all("img").filter(image => image.naturalWidth > 0).length,
    background: getComputedStyle(document.body).backgroundColor,
  };
})()"""


def path_of_browser():
    """Return the browser of this machine, None if it has none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One browser with one tab.  `close` ends it."""

    def __init__(self, place):
        from_browser, to_us = os.pipe()
        from_us, to_browser = os.pipe()
        command = [
            path_of_browser(),
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--no-first-run", f"--user-data-dir={place}", "--remote-debugging-pipe"),
        ]

        def pipes():  # the browser reads 3 and writes 4
            source, target = os.dup(from_us), os.dup(to_us)
            os.dup2(source, 3)
            os.dup2(target, 4)

        self._process = subprocess.Popen(
            command,
            preexec_fn=pipes,
            close_fds=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(from_us)
        os.close(to_us)
        self._out, self._in = to_browser, from_browser
        self._numbers, self._rest, self._session = itertools.count(1), b"", None
        self.events = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def look(self, path, width, *, dark=False):
        """Open a file and return what was requested, what the console said, and how it looks."""
        self.events = []
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[feature])
        self._call("Page.navigate", url=path.as_uri())
        until = time.monotonic() + _SECONDS
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read(until))
        found = self._call("Runtime.evaluate", expression=_MEASURE, returnByValue=True)
        methods = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        requested = [
            event["params"]["request"]["url"]
            for event in self.events
            if event["method"] == "Network.requestWillBeSent"
        ]
        said = [event["params"] for event in self.events if event["method"] in methods]
        return requested, said, found["result"]["value"]

    def _call(self, method, **parameters):
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + _SECONDS
        while True:
            answer = self._read(until)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            if "method" in answer:
                self.events.append(answer)

    def _read(self, until):
        while b"\0" not in self._rest:
            left = until - time.monotonic()
            assert left > 0, "the browser does not answer"
            if select([self._in], [], [], left)[0]:
                read = os.read(self._in, 1 << 16)
                assert read, "the browser has ended"
                self._rest += read
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def close(self):
        """End the browser."""
        self._session = None
        with suppress(AssertionError, OSError):
            self._call("Browser.close")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._out)
        os.close(self._in)
