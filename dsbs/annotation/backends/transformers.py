"""A local causal or sequence-to-sequence model through transformers: batches of like length, the model's chat template."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from dsbs.annotation.backends.base import RejectedError, Reply, Request
from dsbs.config import Recipe
from dsbs.errors import DsbsError, UserError
from dsbs.files import digest

_SAMPLING = ("top_p", "top_k", "min_p", "repetition_penalty")  # what extra_body may add
_BATCHES_WAITING = 4  # so many batches' worth of requests are there to be sorted by length


class TransformersTeacher:
    """One endpoint that gathers requests into batches. Loading raises UserError for a model that is not there."""

    rpm = tpm = None
    weight = 1.0

    def __init__(self, recipe: Recipe) -> None:
        teacher = recipe.teacher
        strange = sorted(set(teacher.extra_body) - set(_SAMPLING))
        if strange:
            raise UserError(
                f"teacher.extra_body: a transformers teacher has no {', '.join(strange)}",
                hint=f"it knows {', '.join(_SAMPLING)}",
            )
        self.identity = identities(recipe)[0]
        self.name = str(teacher.model)
        self.endpoints = (self,)
        self.max_concurrency = in_flight(recipe)
        self._batch_size = teacher.batch_size
        self._context = teacher.context_tokens
        self._load(str(teacher.model), chat=teacher.endpoint == "chat")
        self._waiting: list[tuple[Request, str, int, asyncio.Future[Reply]]] = []
        self._runner: asyncio.Task[None] | None = None

    def _load(self, name: str, *, chat: bool) -> None:
        import torch
        from transformers import (
            AutoConfig,
            AutoModelForCausalLM,
            AutoModelForSeq2SeqLM,
            AutoTokenizer,
        )

        gpu = torch.cuda.is_available()
        dtype = torch.bfloat16 if gpu and torch.cuda.is_bf16_supported() else torch.float32
        # its own code is never run: unless it is told so, transformers asks on stdin
        place: dict[str, Any] = {"pretrained_model_name_or_path": name, "trust_remote_code": False}
        try:
            config = AutoConfig.from_pretrained(**place)
            kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            # a causal model goes on at its prompt's end; an encoder's positions are counted from its beginning
            side = "right" if config.is_encoder_decoder else "left"
            self._tokenizer: Any = AutoTokenizer.from_pretrained(**place, padding_side=side)
            self._model: Any = kind.from_pretrained(
                **place, dtype=dtype, device_map="auto" if gpu else None
            ).eval()
        except Exception as error:  # hub, network, file and format errors share no root
            if "trust_remote_code" in str(error):
                raise UserError(
                    f"teacher.model {name} needs code that comes with it, which is never run here",
                    hint="name a model that transformers knows by itself, or serve this one elsewhere and give its address in "
                    "teacher.base_url",
                ) from None
            raise UserError(
                f"teacher.model {name} cannot be loaded ({' '.join(str(error).split())[:200]})",
                hint="give a Hub id or the folder of a causal or sequence-to-sequence model with its tokenizer",
            ) from None
        self._seq2seq = bool(config.is_encoder_decoder)
        self._limit = self._context or getattr(config, "max_position_embeddings", None)
        self._chat = chat and not self._seq2seq
        if self._chat and not self._tokenizer.chat_template:
            raise UserError(
                f"{name} has no chat template", hint="set teacher.endpoint: completions"
            )
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    async def close(self) -> None:
        if self._runner is not None:
            self._runner.cancel()

    async def complete(self, request: Request) -> Reply:
        text = self._text(request.body)
        length = len(self._tokenizer(text, add_special_tokens=not self._chat)["input_ids"])
        needed = length + (0 if self._seq2seq else int(request.body["max_tokens"]))
        if self._limit and needed > self._limit:
            raise RejectedError(
                f"{length} prompt tokens and max_tokens do not fit the context of {self._limit}"
            )
        mine: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, text, length, mine))
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._run())
        return await mine

    def _text(self, body: dict[str, Any]) -> str:
        if "prompt" in body:
            return str(body["prompt"])
        messages = body["messages"]
        if not self._chat:
            return "\n\n".join(message["content"] for message in messages)
        from jinja2 import TemplateError

        how: dict[str, Any] = {"add_generation_prompt": True, "tokenize": False}
        try:
            return str(self._tokenizer.apply_chat_template(messages, **how))
        except TemplateError:  # some templates know no system message
            system, first, *rest = messages
            joined = {"role": "user", "content": f"{system['content']}\n\n{first['content']}"}
            return str(self._tokenizer.apply_chat_template([joined, *rest], **how))

    async def _run(self) -> None:
        """Decode the longest waiting prompts together until none wait."""
        while self._waiting:
            await asyncio.sleep(
                0.005
            )  # whoever was just answered asks again: a batch of like length needs a choice
            self._waiting = [one for one in self._waiting if not one[3].done()]
            self._waiting.sort(key=lambda one: one[2], reverse=True)
            batch, self._waiting = (
                self._waiting[: self._batch_size],
                self._waiting[self._batch_size :],
            )
            if not batch:
                continue
            try:
                replies = await asyncio.to_thread(
                    self._generate, [one[0] for one in batch], [one[1] for one in batch]
                )
            except MemoryError:
                if self._batch_size == 1:
                    _settle(batch, RejectedError("memory runs out on this one prompt"))
                else:
                    self._batch_size = max(1, self._batch_size // 2)
                    self._waiting += batch
                continue
            except (
                Exception
            ) as error:  # a worker waits for each of these: it must hear of whatever went wrong
                _settle(batch, error)
                continue
            for (*_, future), reply in zip(batch, replies, strict=True):
                if not future.done():
                    future.set_result(reply)

    def _generate(self, requests: list[Request], texts: list[str]) -> list[Reply]:
        """Decode one batch, in a thread. Raises MemoryError."""
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
        how: dict[str, Any] = {name: body[name] for name in _SAMPLING if name in body}
        how |= (
            {"temperature": body["temperature"], "do_sample": True}
            if body.get("temperature")
            else {"do_sample": False}
        )
        if body.get("stop"):
            how |= {"stop_strings": body["stop"], "tokenizer": self._tokenizer}
        if body.get("logprobs"):
            how |= {"output_logits": True}  # scores would be those after temperature and top_p
        # the same batch draws the same samples, another sample of the same rows draws others
        torch.manual_seed(
            int(digest(*texts, *(str(request.sample) for request in requests))[:12], 16)
        )
        try:
            with torch.inference_mode():
                made = self._model.generate(
                    **inputs,
                    max_new_tokens=body["max_tokens"],
                    pad_token_id=self._tokenizer.pad_token_id,
                    return_dict_in_generate=True,
                    **how,
                )
        except torch.OutOfMemoryError:
            raise MemoryError from None
        except (RuntimeError, IndexError, ValueError) as error:
            raise DsbsError(
                f"{self.name} cannot generate ({error})",
                hint="check the model's folder and its tokenizer",
            ) from None
        skipped = 1 if self._seq2seq else inputs["input_ids"].shape[1]
        scores = None
        if made.logits:
            written = made.sequences[:, skipped:]
            steps = (
                torch.log_softmax(step.float(), dim=-1) for step in made.logits
            )  # (B, V) for each token
            scores = torch.stack(
                [step.gather(1, written[:, i : i + 1]).squeeze(1) for i, step in enumerate(steps)],
                dim=1,
            )
        prompts = inputs["attention_mask"].sum(dim=1).tolist()
        return [
            self._reply(
                ids,
                None if scores is None else scores[row].tolist(),
                prompts[row],
                body["max_tokens"],
            )
            for row, ids in enumerate(made.sequences[:, skipped:].tolist())
        ]

    def _reply(
        self, ids: list[int], scores: list[float] | None, prompt_tokens: int, max_tokens: int
    ) -> Reply:
        ends = self._model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends]) | {self._tokenizer.eos_token_id}
        at = next((i for i, token in enumerate(ids) if token in ends), None)
        kept = ids if at is None else ids[:at]
        while kept and at is None and kept[-1] == self._tokenizer.pad_token_id:
            kept = kept[:-1]  # ended by a stop string while others of its batch went on
        text = self._tokenizer.decode(kept, skip_special_tokens=True)
        cut = at is None and len(kept) >= max_tokens
        choice: dict[str, Any] = {"text": text, "finish_reason": "length" if cut else "stop"}
        if scores is not None:
            choice["logprobs"] = {"content": self._pieces(kept, scores)}
        return Reply(
            text=text,
            finish_reason=choice["finish_reason"],
            prompt_tokens=prompt_tokens,
            completion_tokens=len(kept),
            raw=json.dumps({"model": self.name, "choices": [choice]}, ensure_ascii=False),
        )

    def _pieces(self, ids: list[int], scores: list[float]) -> list[dict[str, Any]]:
        """Each token's text as it stands in the whole: a token decoded alone loses its leading space."""
        texts = [""]
        for end in range(1, len(ids) + 1):
            text = self._tokenizer.decode(ids[:end], skip_special_tokens=True)
            # a character that is not whole yet belongs to the token that ends it
            texts.append(texts[-1] if text.endswith("\ufffd") and end < len(ids) else text)
        return [
            {"token": after[len(before) :], "logprob": round(score, 6)}
            for before, after, score in zip(texts, texts[1:], scores, strict=False)
        ]


def _settle(batch: list[tuple[Request, str, int, asyncio.Future[Reply]]], error: Exception) -> None:
    for *_, future in batch:
        if not future.done():
            future.set_exception(error)


def in_flight(recipe: Recipe) -> int:
    return _BATCHES_WAITING * recipe.teacher.batch_size


def identities(recipe: Recipe) -> list[str]:
    """The model's name; for a folder also what its weights are called and how large they are."""
    name = str(recipe.teacher.model)
    folder = Path(name)
    weights = ""
    if folder.is_dir():
        files = sorted(
            (file.name, file.stat().st_size)
            for file in folder.iterdir()
            if file.suffix in (".safetensors", ".bin")
        )
        weights = f":{digest(str(files), (folder / 'config.json').read_text() if (folder / 'config.json').is_file() else '')[:16]}"
    return [f"transformers:{name}{weights}#{recipe.teacher.endpoint}"]
