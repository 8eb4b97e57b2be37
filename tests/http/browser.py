"""A headless Chromium by its own protocol, for tests and pictures of the live page."""

import asyncio
import base64
import contextlib
import shutil

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-port=0")


def chromium():
    """Return the browser's path, None where none is installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Tab:
    """One tab of a headless browser, by its own protocol. `errors` is what its console complained about."""

    def __init__(self, channel):
        self._channel = channel
        self._number = 0
        self.errors = []

    async def call(self, method, **params):
        self._number += 1
        await self._channel.send_json({"id": self._number, "method": method, "params": params})
        while True:
            message = await self._channel.receive_json()
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(message["params"]["exceptionDetails"])
            elif message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
                self.errors.append(message["params"]["entry"]["text"])
            elif message.get("id") == self._number:
                return message["result"]

    async def open(self, url):
        for domain in ("Page", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        await self.call("Page.navigate", url=url)

    async def value(self, script):
        return (await self.call("Runtime.evaluate", expression=script))["result"].get("value")

    async def until(self, script):
        """Wait until a script is true in the page."""
        while not await self.value(script):  # noqa: ASYNC110 -- the page is another process
            await asyncio.sleep(0.05)

    async def press(self, key, code):
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            await self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **text)

    async def look(self, width, height, *, mobile=False, dark=False):
        """Take the size and the colours of a screen."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        await self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        await self.call("Emulation.setEmulatedMedia", features=scheme)

    async def picture(self, *, most_px=4000):
        """Return a PNG of the page from its top, `most_px` high at most."""
        size = (await self.call("Page.getLayoutMetrics"))["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(most_px, size["height"]), "scale": 1}
        shot = await self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        return base64.b64decode(shot["data"])


@contextlib.asynccontextmanager
async def browser(path, folder):
    """Start a browser whose profile is in `folder`; yield its tab, and end it."""
    quiet = {"stdout": asyncio.subprocess.DEVNULL, "stderr": asyncio.subprocess.DEVNULL}
    process = await asyncio.create_subprocess_exec(path, *FLAGS, f"--user-data-dir={folder}", "about:blank", **quiet)
    try:
        while not (where := folder / "DevToolsActivePort").is_file() or "\n" not in where.read_text():
            assert process.returncode is None, "Chromium does not start"
            await asyncio.sleep(0.05)
        port = where.read_text().splitlines()[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                pages = [one for one in await answer.json() if one["type"] == "page"]
            async with session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as channel:
                yield Tab(channel)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()
