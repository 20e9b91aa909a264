"""``dsbs push``: upload a student to the Hugging Face Hub."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from dsbs.cli.common import DryRun, Json, print_json
from dsbs.formatting import count, megabytes


def push(
    student: Annotated[
        str,
        typer.Argument(
            metavar="STUDENT", help="Folder of a student, a compressed student or an export."
        ),
    ],
    repository: Annotated[
        str,
        typer.Argument(metavar="REPO", help="OWNER/NAME on the Hub; created if it does not exist."),
    ],
    public: Annotated[
        bool, typer.Option("--public", help="Everybody may read it. Default: private.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace another student in an existing repository.")
    ] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Upload a student and its model card to the Hugging Face Hub, privately unless --public.

    The token is HF_TOKEN, or that of `hf auth login`. Only the files that the student needs are
    uploaded: no checkpoints, records or rows of data.
    """
    from dsbs.project.push import README, check_repository, plan_upload
    from dsbs.project.push import push as upload_to_hub

    check_repository(repository)
    upload = plan_upload(student)
    result: dict[str, Any] = {
        "repository": repository,
        "student": upload.card.name,
        "private": not public,
        "files": upload.sizes,
        "skipped": upload.skipped,
        "dry_run": dry_run,
    }
    if not dry_run:
        pushed = upload_to_hub(upload, repository, public=public, force=force)
        result |= {
            "url": pushed.url,
            "commit": pushed.commit,
            "private": pushed.is_private,
            "new": pushed.is_new,
            "removed": pushed.removed,
        }
    if as_json:
        print_json(result)
        return
    visibility = "private" if result["private"] else "public"
    size = megabytes(sum(upload.sizes.values()) / 1e6)
    if dry_run:
        for name, number in upload.sizes.items():
            print(f"{number:>12,}  {name}")
        print(f"to {repository}, {visibility}: {count(len(upload.names), 'file')}, {size}")
        print(f"not uploaded: {', '.join(upload.skipped) or 'nothing'}")
    else:
        print(f"{result['url']} ({visibility}): {count(len(upload.names), 'file')}, {size}")
    if README in upload.contents:
        print("the model card has no results: `dsbs report` writes one that has", file=sys.stderr)
