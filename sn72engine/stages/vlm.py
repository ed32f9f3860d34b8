"""A yes/no question to a vision-language model behind an OpenAI-compatible server.

Speaks the chat-completions protocol that vLLM, SGLang, llama.cpp and others serve, over plain
HTTP(S) with the standard library.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image as PilImage

from sn72engine.errors import InputError, OptionError
from sn72engine.spec import Options, check_choice, check_int, check_number
from sn72engine.stages.base import Image, Size, StageScores
from sn72kernels import env

QUESTION = (
    "Is there roadwork in this image: cones, barriers, road work signs, diggers or workers on the "
    "road? Answer with one word, yes or no."
)

#: An answer of a few tokens with their alternatives is a few kilobytes.
_MAX_ANSWER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class VlmOptions(Options):
    """Which model to ask, and what.

    Args:
        url: base address of the server, such as ``http://127.0.0.1:8000/v1``.
        model: name under which the server knows the model.
        question: must ask for yes (positive) or no.
        timeout: seconds to wait for the server at each step of a request.
        concurrency: requests under way at once.
        max_side: images are shrunk to at most this many pixels on the longer side.
        jpeg_quality: of the image that is sent.
        max_tokens: longest answer.
        logprobs: ask for token probabilities; without them, or from a server that gives none,
            yes counts ``certainty`` and no counts ``1 - certainty``.
        certainty: probability that a bare yes stands for, in (0.5, 1].
    """

    url: str
    model: str
    question: str = QUESTION
    timeout: float = 5.0
    concurrency: int = 4
    max_side: int = 768
    jpeg_quality: int = 85
    max_tokens: int = 8
    logprobs: bool = True
    certainty: float = 0.9

    def __post_init__(self) -> None:
        # urllib would also open file:// and ftp://.
        if not isinstance(self.url, str) or not re.match(r"https?://[^/\s]", self.url):
            raise OptionError(f"url={self.url!r} must start with http:// or https://")
        for name in ("model", "question"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise OptionError(f"{name}={value!r} must be text")
        check_number("timeout", self.timeout, 0.001, 3600.0)
        check_int("concurrency", self.concurrency, 1, 256)
        check_int("max_side", self.max_side, 16, 8192)
        check_int("jpeg_quality", self.jpeg_quality, 1, 100)
        check_int("max_tokens", self.max_tokens, 1, 4096)
        check_choice("logprobs", self.logprobs, (True, False))
        check_number("certainty", self.certainty, 0.5, 1.0)
        if self.certainty == 0.5:
            raise OptionError("certainty=0.5 would make yes and no the same; use more than 0.5")


class VlmStage:
    """Asks about each image by itself, several at a time.

    An image whose request fails, or whose answer is neither yes nor no, is scored NaN with the
    reason, so it escalates; the others are not affected. SN72_VLM_API_KEY, where set, is sent as
    the bearer token.
    """

    def __init__(self, options: VlmOptions) -> None:
        self.options = options
        self._pool = ThreadPoolExecutor(options.concurrency, thread_name_prefix="sn72-vlm")

    @property
    def needs(self) -> Size | None:
        """A longer side of ``max_side`` is all that is sent."""
        return self.options.max_side, self.options.max_side

    def prepare(self) -> None:
        """Nothing: a server that is down now may be up when it is asked."""

    def score(self, images: Sequence[Image]) -> StageScores:
        """Ask about every image; returns when all are answered or have failed."""
        answers = list(self._pool.map(self._ask_safely, images))
        return StageScores(
            np.array([p for p, _ in answers], np.float32),
            errors={i: reason for i, (_, reason) in enumerate(answers) if reason},
        )

    def close(self) -> None:
        """Stop the request threads; requests under way end by their timeout."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _ask_safely(self, image: Image) -> tuple[float, str]:
        try:
            return parse_answer(self._ask(image), self.options.certainty), ""
        # HTTPException covers a server that does not speak HTTP; it is not an OSError.
        except Exception as error:
            return math.nan, f"{type(error).__name__}: {error}"

    def _ask(self, image: Image) -> Any:
        """The server's answer to one image, parsed from JSON.

        Raises:
            InputError: it is too long or no JSON.
            OSError: the server cannot be reached, refused, or took too long.
        """
        request = urllib.request.Request(
            self.options.url.rstrip("/") + "/chat/completions",
            data=json.dumps(request_body(image, self.options)).encode(),
            headers={"Content-Type": "application/json", **_authorization()},
        )
        try:
            with urllib.request.urlopen(request, timeout=self.options.timeout) as response:
                data = response.read(_MAX_ANSWER_BYTES + 1)
        except urllib.error.HTTPError as error:
            with error:
                detail = error.read(200).decode(errors="replace")
            raise InputError(f"the server answered {error.code}: {detail}") from None
        if len(data) > _MAX_ANSWER_BYTES:
            raise InputError(f"the answer is longer than {_MAX_ANSWER_BYTES} bytes")
        try:
            return json.loads(data)
        except ValueError:
            raise InputError(f"the answer is not JSON: {data[:80]!r}") from None


def request_body(image: Image, options: VlmOptions) -> dict[str, Any]:
    """The chat-completions request about one image."""
    picture = base64.b64encode(_jpeg(image, options)).decode()
    body: dict[str, Any] = {
        "model": options.model,
        "messages": [
            {
                "role": "user",
                "content": [
                    {
                        "type": "image_url",
                        "image_url": {"url": f"data:image/jpeg;base64,{picture}"},
                    },
                    {"type": "text", "text": options.question},
                ],
            }
        ],
        "max_tokens": options.max_tokens,
        "temperature": 0,
    }
    if options.logprobs:
        body |= {"logprobs": True, "top_logprobs": 5}
    return body


def parse_answer(answer: Any, certainty: float) -> float:
    """Probability of yes in a chat-completions answer.

    The text must begin with yes or no. Where the answer has token probabilities, the result is
    ``yes / (yes + no)``, each summed over the spellings among the alternatives of the first
    token that says either; otherwise ``certainty`` or ``1 - certainty``.

    Raises:
        InputError: the answer has another structure, or is neither yes nor no.
    """
    try:
        choice = answer["choices"][0]
        text = choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise InputError(f"the answer has no choices[0].message.content: {answer!r:.200}") from None
    match = re.match(r"\W*(yes|no)\b", text, re.IGNORECASE) if isinstance(text, str) else None
    if match is None:
        raise InputError(f"the answer is neither yes nor no: {text!r:.200}")
    from_tokens = _token_probability(choice)
    if from_tokens is not None:
        return from_tokens
    return certainty if match.group(1).lower() == "yes" else 1.0 - certainty


def _token_probability(choice: Mapping[str, Any]) -> float | None:
    """Probability of yes from token probabilities; None where there are none to use."""
    try:
        for token in choice["logprobs"]["content"]:
            if _word(token["token"]) in ("yes", "no"):
                share = {"yes": 0.0, "no": 0.0}
                alternatives = token.get("top_logprobs") or [token]
                for other in alternatives:
                    if _word(other["token"]) in share:
                        share[_word(other["token"])] += math.exp(min(other["logprob"], 0.0))
                total = share["yes"] + share["no"]
                # NaN from the server fails this comparison too.
                return share["yes"] / total if total > 0 else None
    except (KeyError, TypeError, AttributeError):
        pass  # servers differ in what they send; the text has been read already
    return None


def _word(token: str) -> str:
    return re.sub(r"\W", "", token).lower()


def _jpeg(image: Image, options: VlmOptions) -> bytes:
    picture = PilImage.fromarray(image)
    picture.thumbnail((options.max_side, options.max_side))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=options.jpeg_quality)
    return stream.getvalue()


def _authorization() -> dict[str, str]:
    key = env.get("SN72_VLM_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}
