"""Hugging Face Hub: uploads a student, a compressed student or an export as a model repository."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from dsbs.errors import DsbsError, UserError
from dsbs.formatting import escape_markdown
from dsbs.records.results import COMPRESSION_RECORD
from dsbs.reporting.card import loading_text
from dsbs.run_folder import TRAINING_RECORD
from dsbs.students.card import CARD, StudentCard, read_card
from dsbs.students.formats import PROMPT_FORMAT_FILE
from dsbs.students.weights import RATIONALE_FOLDER, WEIGHT_FILES

README = "README.md"
# Everything else stays: records, checkpoints, metrics, and golden.jsonl, which holds rows of data.
_UPLOADED = (
    *WEIGHT_FILES,
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "vocab*",
    "shared_vocabulary.*",
    "merges.txt",
    "chat_template*",
    "calibration.json",
    "threshold.json",
    PROMPT_FORMAT_FILE,
    CARD,
    "export.json",
    "predict.py",
    README,
    "LICENSE*",
)
_OF_TRAINING = ("optimizer*", "scheduler*", "scaler*", "rng_state*", "training_args*")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_TOKEN = re.compile(r"hf_\w+", re.ASCII)


@dataclass(frozen=True, slots=True)
class Upload:
    """The files of a student that go to the Hub. ``contents`` replaces those of some files."""

    folder: Path
    card: StudentCard
    names: list[str]
    contents: dict[str, bytes]
    skipped: list[str]
    """Files and folders that are not uploaded."""

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {name: self._size(name) for name in self.names}

    def _size(self, name: str) -> int:
        if name in self.contents:
            return len(self.contents[name])
        return (self.folder / name).stat().st_size

    @property
    def operations(self) -> list[Any]:
        """One operation of a commit for each file."""
        from huggingface_hub import CommitOperationAdd

        return [
            CommitOperationAdd(name, self.contents.get(name, str(self.folder / name)))
            for name in self.names
        ]


@dataclass(frozen=True, slots=True)
class Pushed:
    """A commit on the Hub."""

    url: str
    commit: str
    is_private: bool
    is_new: bool
    removed: list[str]
    """Files of the repository's earlier student that this one does not have."""


def plan_upload(student: str | Path) -> Upload:
    """The files to upload. Raises UserError where ``student`` is not a finished student."""
    folder = Path(student)
    card = read_card(folder)
    records = (TRAINING_RECORD, COMPRESSION_RECORD)
    if (folder / "work.json").exists() and not any((folder / name).exists() for name in records):
        raise UserError(f"{folder} is not finished", hint="run the command that makes it again")
    files = [path.name for path in folder.iterdir() if path.is_file()]
    files += [f"{RATIONALE_FOLDER}/{path.name}" for path in (folder / RATIONALE_FOLDER).glob("*")]
    names = sorted(name for name in files if _is_uploaded(name))
    if not any(_matches(name, WEIGHT_FILES) for name in names):
        raise UserError(f"{folder} has no weights", hint="run the command that makes it again")
    contents = {CARD: _public_card(card)}
    if README not in names:
        names.append(README)
        contents[README] = _short_readme(card)
    uploaded = {name.partition("/")[0] for name in names}
    skipped = sorted(path.name for path in folder.iterdir() if path.name not in uploaded)
    return Upload(folder, card, names, contents, skipped)


def _is_uploaded(name: str) -> bool:
    """Whether a file of a student, or of its rationale decoder, goes to the Hub."""
    name = name.removeprefix(f"{RATIONALE_FOLDER}/")
    return "/" not in name and _matches(name, _UPLOADED) and not _matches(name, _OF_TRAINING)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _public_card(card: StudentCard) -> bytes:
    """The card, with the names of local data files instead of their paths."""
    data = card.task.data
    sources = {split: getattr(data, split) for split in ("train", "valid", "test", "served")}
    names = {
        split: Path(source).name
        for split, source in sources.items()
        if source is not None and not source.startswith("hub://")
    }
    task = card.task.model_copy(update={"data": data.model_copy(update=names)})
    return card.model_copy(update={"task": task}).model_dump_json(indent=2).encode() + b"\n"


def _short_readme(card: StudentCard) -> bytes:
    """A model card without results, for a student that no report has described."""
    from huggingface_hub import ModelCardData

    tags = ["dsbs", "distillation", *card.method.split("+"), "arxiv:2305.02301"]
    metadata = ModelCardData(tags=tags)
    if card.format == "transformers" and card.head == "text":
        metadata.library_name = "transformers"
    lines = [
        "---",
        metadata.to_yaml(),
        "---",
        "",
        f"# {escape_markdown(card.name)}",
        "",
        f"A student for the task {escape_markdown(card.task.name)}, trained by dsbs with the "
        f"method {escape_markdown(card.method)} on {card.labels} labels. It has not been evaluated "
        "in this card.",
        "",
        "## Use",
        "",
        loading_text(card),
        "",
    ]
    return "\n".join(lines).encode()


def push(upload: Upload, repository: str, *, public: bool = False, force: bool = False) -> Pushed:
    """Commit a student to ``repository`` (owner/name), which is created where it does not exist.

    New repositories are private unless ``public``. A repository with another student is refused
    unless ``force``, and so is a public one unless ``public``. The token is huggingface_hub's:
    HF_TOKEN, or that of ``hf auth login``. Raises UserError and DsbsError.
    """
    check_repository(repository)
    from huggingface_hub import CommitOperationDelete, HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    hub = HfApi()
    stale: list[str] = []
    with _hub_errors(repository):
        try:
            present = hub.model_info(repository)
        except RepositoryNotFoundError:
            hub.create_repo(repository, repo_type="model", private=not public)
            is_private = not public
            is_new = True
        else:
            is_private = bool(present.private)
            is_new = False
            _check_visibility(repository, is_private, public)
            files = [file.rfilename for file in present.siblings or ()]
            if not force:
                _check_same_student(hub, repository, files, upload)
            stale = [name for name in files if _is_uploaded(name) and name not in upload.names]
        commit = hub.create_commit(
            repository,
            [*upload.operations, *(CommitOperationDelete(name) for name in stale)],
            commit_message=f"Upload {upload.card.name} with dsbs",
            repo_type="model",
        )
    url = f"{hub.endpoint}/{repository}"
    return Pushed(url, str(commit.oid), is_private, is_new, stale)


def check_repository(repository: str) -> None:
    """Raises UserError for what is not an owner and a name."""
    if not _REPOSITORY.fullmatch(repository):
        raise UserError(
            f"{repository!r} does not name a repository of the Hub",
            hint="give OWNER/NAME, e.g. my-team/tickets",
        )


def _check_visibility(repository: str, is_private: bool, public: bool) -> None:
    if not is_private and not public:
        raise UserError(
            f"{repository} exists and is public", hint="pass --public, or give another name"
        )
    if is_private and public:
        raise UserError(
            f"{repository} exists and is private",
            hint="leave --public out, or change its visibility on the Hub first",
        )


def _check_same_student(hub: Any, repository: str, files: list[str], upload: Upload) -> None:
    """Raises UserError where the repository holds files of anything else than this student."""
    hint = "give another name, or replace its files with --force"
    if CARD in files:
        with tempfile.TemporaryDirectory() as folder:
            hub.hf_hub_download(repository, CARD, repo_type="model", local_dir=folder)
            if _identity(read_card(folder)) != _identity(upload.card):
                raise UserError(f"{repository} holds another student", hint=hint)
    elif set(files) - {".gitattributes"}:
        raise UserError(f"{repository} exists and does not hold a student", hint=hint)


def _identity(card: StudentCard) -> dict[str, Any]:
    """The card without what may change when the same student is trained again."""
    return card.model_dump(mode="json", exclude={"task": {"data", "limit"}})


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """Raise errors of the Hub and of the network as messages, without any token."""
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError

    try:
        yield
    except DsbsError:
        raise
    except HFValidationError as error:
        raise UserError(
            f"{repository} is not a valid name ({error})", hint="give OWNER/NAME"
        ) from None
    except Exception as error:  # the network's errors share no root
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        if isinstance(error, LocalTokenNotFoundError) or status in (401, 403):
            raise UserError(
                f"{repository} cannot be written: no token, or one without write access to it",
                hint="export HF_TOKEN=<a token with write access>, or run `hf auth login`",
            ) from None
        message = _TOKEN.sub("hf_…", f"{type(error).__name__}: {error}")[:300]
        raise DsbsError(
            f"{repository} could not be written ({message})", hint="run the same command again"
        ) from None
