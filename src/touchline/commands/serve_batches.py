"""Photos of many requests through one model: decoded side by side, and judged together."""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager

import numpy as np
from fastapi import FastAPI, HTTPException

from touchline.commands.serve_beside import Canary, Shadow
from touchline.core.errors import TouchlineError
from touchline.core.params import Params
from touchline.data.served import CHAMPION, Asked, Recorder
from touchline.models.classifier import Answer, Classifier, pixels
from touchline.models.inference import BATCH

_log = logging.getLogger(__name__)
# What the model makes of a photo, and how similar that is to its training photos.
_Judged = tuple[np.ndarray, float | None]
Answered = tuple[Answer | HTTPException, str]


class Batches:
    """Takes photos in as far as there is room, and asks the model about all that wait at once.

    Args:
        most: photos that may be decoded or wait for the model at a time.
        most_bytes: of one photo's file.
        recorder: keeps what was asked; None keeps nothing.
        shadow: also classifies photos that were answered. canary: answers a share of the photos.
        role: as in `served.Row`.

    Attributes:
        photos: how many there are now.
    """

    def __init__(
        self,
        classifier: Classifier,
        params: Params,
        most: int,
        most_bytes: int,
        recorder: Recorder | None = None,
        shadow: Shadow | None = None,
        canary: Canary | None = None,
        role: str = CHAMPION,
    ) -> None:
        self._classifier, self._params, self._recorder = classifier, params, recorder
        self._shadow, self._canary, self._role = shadow, canary, role
        if shadow:
            shadow.is_busy = lambda: self.photos > 0
        self._most, self._most_bytes = most, most_bytes
        self._waiting: asyncio.Queue[tuple[np.ndarray, asyncio.Future[_Judged]]] = asyncio.Queue()
        self.photos = 0

    @asynccontextmanager
    async def open(self, app: FastAPI) -> AsyncIterator[None]:
        """Answer while the block runs."""
        import cv2

        cv2.setNumThreads(1)  # photos are spread over the cores; OpenCV spreading each one over them too only costs
        async with AsyncExitStack() as running:
            self._decoders = running.enter_context(ThreadPoolExecutor(os.cpu_count()))
            self._asker = running.enter_context(ThreadPoolExecutor(1))
            if self._shadow:
                running.enter_context(self._shadow)
            if self._canary:
                await running.enter_async_context(self._canary.batches.open(app))
            asking = asyncio.create_task(self._ask())
            try:
                yield
            finally:
                asking.cancel()

    def refuse_if_full(self, photos: int = 1) -> None:
        """Raise HTTPException where there is no room for as many more photos."""
        if self.photos + photos > self._most:
            raise HTTPException(503, "too many requests at once: try again in a moment", {"Retry-After": "1"})

    async def answers(self, photos: Iterable[bytes]) -> list[Answered]:
        """The answer to each photo, in their order, or why there is none; and the name of the model that gave it.

        Raises:
            HTTPException: there is no room for them.
        """
        photos = list(photos)
        self.refuse_if_full(len(photos))
        self.photos += len(photos)
        try:
            return await asyncio.gather(*map(self._routed, photos))
        finally:
            self.photos -= len(photos)

    async def _routed(self, photo: bytes) -> Answered:
        if self._canary and self._canary.takes(photo):
            answered = await self._canary.batches._routed(photo)
            # The failure of a canary is in the log and recorded. The client gets the champion's answer.
            if not (isinstance(answered[0], HTTPException) and answered[0].status_code == 500):
                return answered
        return await self._answer(photo), self._classifier.name

    async def _answer(self, photo: bytes) -> Answer | HTTPException:
        began = time.perf_counter()
        decoded, asked = await asyncio.get_running_loop().run_in_executor(self._decoders, self._read, photo)
        answer = decoded if isinstance(decoded, HTTPException) else await self._judged(decoded)
        if self._recorder and asked:
            said = answer.detail if isinstance(answer, HTTPException) else vars(answer)
            named = (self._classifier.name, self._classifier.files.model_sha256) if self._role != CHAMPION else None
            self._recorder.add(asked, said, 1000 * (time.perf_counter() - began), role=self._role, model=named)
            if self._shadow and isinstance(answer, Answer):
                self._shadow.offer(photo, asked)
        return answer

    async def _judged(self, decoded: np.ndarray) -> Answer | HTTPException:
        judged = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((decoded, judged))
        try:
            # Shielded: a request whose client has gone must not cancel its whole batch.
            row, similarity = await asyncio.shield(judged)
            return self._classifier.answer(row, similarity, self._params.predict)
        except TouchlineError as error:
            return HTTPException(500, str(error))

    def _read(self, photo: bytes) -> tuple[np.ndarray | HTTPException, Asked | None]:
        """A photo's pixels, or why it cannot be judged; and what is recorded of it."""
        found: np.ndarray | HTTPException
        try:
            if len(photo) > self._most_bytes:
                found = HTTPException(413, f"the photo is larger than {self._most_bytes / 2**20:g} MB")
            else:
                found = pixels(photo, self._classifier.side, self._params.validate_.max_megapixels)
        except TouchlineError as error:
            found = HTTPException(422, str(error).removeprefix("photo "))
        square = found if isinstance(found, np.ndarray) else None
        return found, self._recorder.asked(photo, square) if self._recorder else None

    def _judge(self, images: np.ndarray) -> list[_Judged]:
        rows = self._classifier.forward(images)
        return list(zip(rows, self._classifier.similarities(rows), strict=True))

    async def _ask(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < BATCH and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            images = np.stack([decoded for decoded, _ in batch])
            try:
                found = await loop.run_in_executor(self._asker, self._judge, images)
            except Exception:  # whatever it is, it is the answer to these photos, and the next are asked about
                _log.exception("the model failed")
                for _, judged in batch:
                    judged.set_exception(TouchlineError("the model failed: the server's log says how"))
            else:
                for (_, judged), each in zip(batch, found, strict=True):
                    judged.set_result(each)
