"""Requests to an inference server: with retries, backoff and a limit on their rate.

What may be over soon (a broken connection, a timeout, a server that is starting again or asks for peace) is tried
again, after times that double, at random (exponential backoff with full jitter). What will not is a UserError. The API
key comes from the environment and goes nowhere but into a header.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import time
from email.utils import parsedate_to_datetime
from typing import Any

from distill.config import EndpointConfig, UserError

logger = logging.getLogger(__name__)
TEMPORARY = {408, 425, 429, 500, 502, 503, 504}  # statuses after which the same request may succeed
LONGEST_PAUSE = 60.0  # seconds between two tries, unless the server asks for more


class Temporary(Exception):
    """A request that failed and may succeed when it is made again."""


class Server:
    """Requests with retries, backoff and a limit on their rate."""

    def __init__(self, endpoint: EndpointConfig, concurrency: int, rate: float | None) -> None:
        """`concurrency`: requests under way at one time. `rate`: requests a second, None for no limit."""
        try:
            import aiohttp
            import tenacity
        except ImportError:
            raise UserError("endpoint: needs an extra: pip install 'potstill[served]'") from None
        self.aiohttp, self.tenacity = aiohttp, tenacity
        self.endpoint, self.url = endpoint, endpoint.url.rstrip("/").removesuffix("/v1")
        self.interval, self.last_told = 1 / rate if rate else 0.0, -math.inf
        self.next_slot = self.held_until = 0.0
        self.key = ""
        if endpoint.api_key_env:
            self.key = os.environ.get(endpoint.api_key_env, "").strip()
            if not self.key:
                raise UserError(
                    f"endpoint.api_key_env: expected the API key in the environment variable {endpoint.api_key_env}, "
                    "found none"
                )
        self.session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=endpoint.timeout),
            connector=aiohttp.TCPConnector(limit=0),
            headers={"Authorization": f"Bearer {self.key}"} if self.key else {},
        )
        self.gate = asyncio.Semaphore(concurrency)

    async def close(self) -> None:
        await self.session.close()

    async def check_model(self) -> None:
        """UserError where the server says that it has another model, or reads less at once than we send."""
        answer = await self._patiently("GET", "/v1/models")
        models = {model.get("id"): model for model in answer.get("data") or []}
        if models and self.endpoint.model not in models:
            names = ", ".join(map(str, list(models)[:8]))
            raise UserError(f"endpoint.model: expected a model of {self.url}: {names}; found {self.endpoint.model}")
        limit = models.get(self.endpoint.model, {}).get("max_model_len")
        if isinstance(limit, int) and self.endpoint.window >= limit:  # one more token is generated
            raise UserError(f"endpoint.window: expected less than the server's {limit}, found {self.endpoint.window}")

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request, made again as often as the endpoint says."""
        return await self._patiently("POST", path, body)

    async def _patiently(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        tenacity = self.tenacity
        attempts = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self.endpoint.retries + 1),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=LONGEST_PAUSE),
            retry=tenacity.retry_if_exception_type(Temporary),
            before_sleep=self._tell,
            reraise=True,
        )
        try:
            return await attempts(self._request, method, path, body)
        except Temporary as error:
            raise UserError(
                f"{self.url}: {error}, {self.endpoint.retries + 1} times in a row. What is built is kept: run the same "
                "command when the server is up again, or give endpoint.retries or endpoint.timeout more room",
                every_process=True,
            ) from None

    def _tell(self, state: Any) -> None:
        """Report trouble, but not each of many requests that share it."""
        if time.monotonic() - self.last_told > 10:
            self.last_told = time.monotonic()
            logger.warning("%s: %s; trying again", self.url, state.outcome.exception())

    async def _request(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """One try. Temporary where another may succeed, UserError where none will."""
        try:
            async with self.gate:
                await self._turn()
                async with self.session.request(method, self.url + path, json=body, allow_redirects=False) as response:
                    status, headers, content = response.status, response.headers, await response.read()
            if status == 200:
                answer = json.loads(content)
                if not isinstance(answer, dict):
                    raise ValueError("no JSON object")
                return answer
        except TimeoutError:
            raise Temporary(f"no answer within {self.endpoint.timeout:g} s") from None
        except (self.aiohttp.ClientError, OSError, ValueError) as error:
            raise Temporary(self._safe(f"{type(error).__name__}: {error}")) from None
        said = self._safe(content.decode(errors="replace").strip()[:400])
        if status in TEMPORARY:
            self._hold(headers.get("Retry-After"))
            raise Temporary(f"status {status}: {said[:200]}")
        if status == 404 and method == "GET":  # a server without a list of models
            return {}
        hint = "; is the key in endpoint.api_key_env right?" if status in (401, 403) else ""
        raise UserError(f"{self.url}{path}: the server refused with status {status}: {said}{hint}", every_process=True)

    async def _turn(self) -> None:
        """Wait until the limit on the rate, or a server that asked for peace, allows a request."""
        while True:
            now = time.monotonic()
            slot = max(now, self.next_slot, self.held_until)
            self.next_slot = slot + self.interval
            await asyncio.sleep(slot - now)
            if slot >= self.held_until:  # no server has asked for peace meanwhile
                return

    def _hold(self, retry_after: str | None) -> None:
        """No request before the time that a server names: seconds, or a date."""
        try:
            seconds = float(retry_after or 0)
        except ValueError:
            try:
                seconds = parsedate_to_datetime(retry_after or "").timestamp() - time.time()
            except ValueError:
                return
        self.held_until = max(self.held_until, time.monotonic() + min(max(seconds, 0), 3600))

    def _safe(self, text: str) -> str:
        """Without the key, which some servers repeat."""
        return text.replace(self.key, "***") if self.key else text

    def part(self, answer: Any, *path: str | int) -> Any:
        """A part of an answer; UserError where it is not there."""
        for step in path:
            try:
                answer = answer[step]
            except (KeyError, IndexError, TypeError):
                answer = None
        if answer is None:
            raise UserError(
                f"{self.url}: expected {'.'.join(map(str, path))} in the answer, found none; is it a server of kind "
                f"{self.endpoint.server} (endpoint.server) that gives log-probabilities of prompts?",
                every_process=True,
            )
        return answer
