"""Transformers teacher: a local decoder or encoder-decoder model, in batches of similar length."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsbs.annotation.backends import LocalTeacher, RejectedError, Reply, Request
from dsbs.config import Recipe
from dsbs.errors import DsbsError, UserError
from dsbs.files import digest
from dsbs.students.weights import device, supports_bf16

_SAMPLING = ("top_p", "top_k", "min_p", "repetition_penalty")  # what extra_body may set
_BATCHES_WAITING = 4  # so many batches of requests wait, to be sorted by length
_BATCH_DELAY_S = 0.005


@dataclass(frozen=True, slots=True)
class _WaitingRequest:
    request: Request
    text: str
    prompt_tokens: int
    future: asyncio.Future[Reply]


class TransformersTeacher(LocalTeacher):
    """One endpoint that gathers requests into batches. Raises UserError for a missing model."""

    title = "transformers"
    default_reply_tokens = 1024

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        teacher = recipe.teacher
        unknown = sorted(set(teacher.extra_body) - set(_SAMPLING))
        if unknown:
            raise UserError(
                f"teacher.extra_body: a transformers teacher has no {', '.join(unknown)}",
                hint=f"use {', '.join(_SAMPLING)}",
            )
        self._batch_size = teacher.batch_size
        self._load(self.name, teacher.context_tokens, chat=teacher.endpoint == "chat")
        self._max_reply_tokens: int | None = None
        if recipe.annotate.max_tokens is None and self._limit:
            self._max_reply_tokens = max(1, self._limit // 4)
        self._waiting: list[_WaitingRequest] = []
        self._runner: asyncio.Task[None] | None = None

    def _load(self, name: str, context_tokens: int | None, *, chat: bool) -> None:
        import torch
        from transformers import (
            AutoConfig,
            AutoModelForCausalLM,
            AutoModelForSeq2SeqLM,
            AutoTokenizer,
        )

        dtype = torch.bfloat16 if supports_bf16() else torch.float32
        device_map = {"cuda": "auto", "mps": "mps", "cpu": None}[device()]
        # without an explicit False, transformers asks on stdin whether to run the model's own code
        source: dict[str, Any] = {"pretrained_model_name_or_path": name, "trust_remote_code": False}
        try:
            config = AutoConfig.from_pretrained(**source)
            # a decoder continues at its prompt's end; an encoder counts positions from the start
            padding_side = "left"
            model_class: Any = AutoModelForCausalLM
            if config.is_encoder_decoder:
                padding_side = "right"
                model_class = AutoModelForSeq2SeqLM
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                **source, padding_side=padding_side
            )
            self._model: Any = model_class.from_pretrained(
                **source, dtype=dtype, device_map=device_map
            ).eval()
        except Exception as error:  # hub, network, file and format errors share no root
            raise _loading_error(name, error) from None
        self._seq2seq = bool(config.is_encoder_decoder)
        self._limit = context_tokens or getattr(config, "max_position_embeddings", None)
        self._chat = chat and not self._seq2seq
        if self._chat and not self._tokenizer.chat_template:
            raise UserError(
                f"{name} has no chat template", hint="set teacher.endpoint: completions"
            )
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    @classmethod
    def max_in_flight(cls, recipe: Recipe) -> int:
        return min(_BATCHES_WAITING * recipe.teacher.batch_size, recipe.annotate.concurrency)

    @classmethod
    def identities(cls, recipe: Recipe) -> list[str]:
        """The model's name; for a folder also the names and sizes of its weights."""
        name = str(recipe.teacher.model)
        folder = Path(name)
        weights = ""
        if folder.is_dir():
            files = sorted(
                (file.name, file.stat().st_size)
                for file in folder.iterdir()
                if file.suffix in (".safetensors", ".bin")
            )
            config = folder / "config.json"
            config_text = config.read_text(encoding="utf-8") if config.is_file() else ""
            weights = f":{digest(str(files), config_text)[:16]}"
        return [f"transformers:{name}{weights}#{recipe.teacher.endpoint}"]

    async def close(self) -> None:
        if self._runner is not None:
            self._runner.cancel()

    async def complete(self, request: Request) -> Reply:
        """See ``Endpoint``."""
        if self._max_reply_tokens is not None:
            tokens = min(self._max_reply_tokens, int(request.body["max_tokens"]))
            request = replace(request, body=request.body | {"max_tokens": tokens})
        text = self._text(request.body)
        prompt_tokens = len(self._tokenizer(text, add_special_tokens=not self._chat)["input_ids"])
        context_tokens = prompt_tokens
        if not self._seq2seq:
            context_tokens += int(request.body["max_tokens"])
        if self._limit and context_tokens > self._limit:
            raise RejectedError(
                f"{prompt_tokens} prompt tokens and max_tokens do not fit the context of "
                f"{self._limit}",
                "row",
            )
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting.append(_WaitingRequest(request, text, prompt_tokens, future))
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._run())
        return await future

    def _text(self, body: dict[str, Any]) -> str:
        if "prompt" in body:
            return str(body["prompt"])
        messages = body["messages"]
        if not self._chat:
            return "\n\n".join(message["content"] for message in messages)
        from jinja2 import TemplateError

        options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": False}
        try:
            return str(self._tokenizer.apply_chat_template(messages, **options))
        except TemplateError:  # some templates have no system message
            system, first, *rest = messages
            joined = {"role": "user", "content": f"{system['content']}\n\n{first['content']}"}
            return str(self._tokenizer.apply_chat_template([joined, *rest], **options))

    async def _run(self) -> None:
        """Decode the longest waiting prompts together until none wait."""
        while self._waiting:
            # a row that was just answered asks again: batches of similar length need a choice
            await asyncio.sleep(_BATCH_DELAY_S)
            self._waiting = [waiting for waiting in self._waiting if not waiting.future.done()]
            self._waiting.sort(key=lambda waiting: waiting.prompt_tokens, reverse=True)
            batch = self._waiting[: self._batch_size]
            self._waiting = self._waiting[self._batch_size :]
            if not batch:
                continue
            try:
                replies = await asyncio.to_thread(
                    self._generate,
                    [waiting.request for waiting in batch],
                    [waiting.text for waiting in batch],
                )
            except MemoryError:
                if self._batch_size == 1:
                    _fail(batch, RejectedError("not enough memory for this prompt alone", "row"))
                else:
                    self._batch_size = max(1, self._batch_size // 2)
                    self._waiting += batch
                continue
            except Exception as error:  # callers wait for these futures, whatever went wrong
                _fail(batch, error)
                continue
            for waiting, reply in zip(batch, replies, strict=True):
                if not waiting.future.done():
                    waiting.future.set_result(reply)

    def _generate(self, requests: list[Request], texts: list[str]) -> list[Reply]:
        """Decode one batch, in a thread. Raises MemoryError, DsbsError."""
        import torch

        body = requests[0].body
        inputs = self._tokenizer(
            texts, return_tensors="pt", padding=True, add_special_tokens=not self._chat
        )
        inputs = {
            name: tensor.to(self._model.device)
            for name, tensor in inputs.items()
            if name != "token_type_ids"
        }
        # the same batch draws the same samples, another sample of the same rows draws others
        seed = digest(*texts, *(str(request.sample) for request in requests))
        torch.manual_seed(int(seed[:12], 16))
        try:
            with torch.inference_mode():
                output = self._model.generate(
                    **inputs,
                    max_new_tokens=body["max_tokens"],
                    pad_token_id=self._tokenizer.pad_token_id,
                    return_dict_in_generate=True,
                    **self._generation_options(body),
                )
        except torch.OutOfMemoryError:
            raise MemoryError from None
        except (RuntimeError, IndexError, ValueError) as error:
            raise DsbsError(
                f"{self.name} cannot generate ({error})",
                hint="check the model's folder and its tokenizer",
            ) from None
        skipped = 1 if self._seq2seq else inputs["input_ids"].shape[1]
        generated = output.sequences[:, skipped:]  # (B, T)
        logprobs: list[list[float] | None] = [None] * len(requests)
        if output.logits:
            steps = (torch.log_softmax(step.float(), dim=-1) for step in output.logits)  # (B, V)
            columns = [
                step.gather(1, generated[:, i : i + 1]).squeeze(1) for i, step in enumerate(steps)
            ]
            logprobs = torch.stack(columns, dim=1).tolist()
        prompt_tokens = inputs["attention_mask"].sum(dim=1).tolist()
        return [
            self._reply(token_ids, logprobs[row], prompt_tokens[row], body["max_tokens"])
            for row, token_ids in enumerate(generated.tolist())
        ]

    def _generation_options(self, body: dict[str, Any]) -> dict[str, Any]:
        """A request body's fields as arguments of ``generate``."""
        options = {name: body[name] for name in _SAMPLING if name in body}
        options["do_sample"] = bool(body.get("temperature"))
        if options["do_sample"]:
            options["temperature"] = body["temperature"]
        if body.get("stop"):
            options |= {"stop_strings": body["stop"], "tokenizer": self._tokenizer}
        if body.get("logprobs"):
            options["output_logits"] = True  # scores would be those after temperature and top_p
        return options

    def _reply(
        self,
        token_ids: list[int],
        logprobs: list[float] | None,
        prompt_tokens: int,
        max_tokens: int,
    ) -> Reply:
        ends = self._model.generation_config.eos_token_id
        if not isinstance(ends, list):
            ends = [ends]
        ends = {*ends, self._tokenizer.eos_token_id}
        end = next((i for i, token_id in enumerate(token_ids) if token_id in ends), None)
        if end is not None:
            token_ids = token_ids[:end]
        else:  # trailing padding: ended by a stop string while others of its batch went on
            while token_ids and token_ids[-1] == self._tokenizer.pad_token_id:
                token_ids = token_ids[:-1]
        text = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        finish_reason = "stop"
        if end is None and len(token_ids) >= max_tokens:
            finish_reason = "length"
        choice: dict[str, Any] = {"text": text, "finish_reason": finish_reason}
        if logprobs is not None:
            choice["logprobs"] = {"content": self._token_logprobs(token_ids, logprobs)}
        return Reply(
            text=text,
            finish_reason=finish_reason,
            prompt_tokens=prompt_tokens,
            completion_tokens=len(token_ids),
            raw=json.dumps({"model": self.name, "choices": [choice]}, ensure_ascii=False),
        )

    def _token_logprobs(self, token_ids: list[int], logprobs: list[float]) -> list[dict[str, Any]]:
        """Each token's text within the whole: a token decoded alone loses its leading space."""
        texts = [""]
        for end in range(1, len(token_ids) + 1):
            text = self._tokenizer.decode(token_ids[:end], skip_special_tokens=True)
            if text.endswith("\ufffd") and end < len(token_ids):
                text = texts[-1]  # an unfinished character belongs to the token that ends it
            texts.append(text)
        return [
            {"token": after[len(before) :], "logprob": round(logprob, 6)}
            for before, after, logprob in zip(texts, texts[1:], logprobs, strict=False)
        ]


def _loading_error(name: str, error: Exception) -> UserError:
    if "trust_remote_code" in str(error):
        return UserError(
            f"teacher.model {name} needs code from its repository, which dsbs never runs",
            hint="use a model that transformers supports itself, or serve this one elsewhere and "
            "put its address into teacher.base_url",
        )
    return UserError(
        f"teacher.model {name} cannot be loaded ({' '.join(str(error).split())[:200]})",
        hint="give a Hub id or the folder of a causal or sequence-to-sequence model with its "
        "tokenizer",
    )


def _fail(batch: list[_WaitingRequest], error: Exception) -> None:
    for waiting in batch:
        if not waiting.future.done():
            waiting.future.set_exception(error)
