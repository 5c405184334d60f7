"""A headless Chromium, told what to do over the pipe of its DevTools protocol."""

import base64
import io
import json
import os
import select
import signal
import subprocess
import time

from PIL import Image

FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    "--no-sandbox",  # which needs rights that containers do not give; only our own pages are opened
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
    "--hide-scrollbars",
)


class Chromium:
    """A context in which a Chromium shows one page.

    Args:
        profile: a folder for its files.
        size: (width, height) of the window.
        script: JavaScript that is run in every page before the page's own.
        timeout: seconds for any one answer.
    """

    def __init__(self, profile, size, script="", timeout=60):
        self.profile, self.size, self.script, self.timeout = profile, size, script, timeout
        self.session, self.number, self.received = {}, 0, b""

    def __enter__(self):
        commands, self.commands = os.pipe()
        self.answers, answers = os.pipe()
        # It reads commands from descriptor 3 and writes answers to descriptor 4.
        command = f'exec chromium "$@" 3<&{commands} 4>&{answers}'
        flags = [*FLAGS, f"--user-data-dir={self.profile}", "--window-size={},{}".format(*self.size)]
        self.process = subprocess.Popen(
            ["bash", "-c", command, "bash", *flags],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(commands)
        os.close(answers)
        try:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
            self.session = {"sessionId": attached["sessionId"]}
            self.call("Page.enable")
            self.call("Page.addScriptToEvaluateOnNewDocument", source=self.script)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.commands)
        os.close(self.answers)

    def call(self, method, **parameters):
        """What Chromium answers to a method of the protocol."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters, **self.session}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + self.timeout
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == self.number:
                assert "result" in answer, f"{method}: {answer}"
                return answer["result"]

    def _receive(self, deadline):
        while b"\0" not in self.received:
            ready, _, _ = select.select([self.answers], [], [], max(deadline - time.monotonic(), 0))
            assert ready, f"no answer from Chromium in {self.timeout} s"
            received = os.read(self.answers, 1 << 20)
            assert received, "Chromium has ended"
            self.received += received
        message, self.received = self.received.split(b"\0", 1)
        return json.loads(message)

    def open(self, url):
        """Go to a page; it need not have been loaded when this returns."""
        answer = self.call("Page.navigate", url=url)
        assert "errorText" not in answer, f"{url}: {answer['errorText']}"

    def evaluate(self, expression):
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self):
        """The page as a picture."""
        return Image.open(io.BytesIO(base64.b64decode(self.call("Page.captureScreenshot")["data"])))
