"""The load of `benchmarks/annotate.py` through bespokelabs-curator.

    python -m venv curator && curator/bin/pip install bespokelabs-curator==0.1.31
    curator/bin/python benchmarks/peers/curator_peer.py --base-url http://127.0.0.1:8000/v1 --rows 2000 --concurrency 64

Its limits on requests and tokens a minute are raised out of the way: an endpoint whose limits it does not know it treats as
slow. Its cache lies in a fresh folder, its viewer and telemetry are off. It counts tokens by a table that tiktoken downloads;
where that cannot be had, a count of characters stands in, which costs it less.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from importlib.metadata import version

os.environ |= {
    "CURATOR_DISABLE_RICH_DISPLAY": "1",
    "CURATOR_VIEWER": "0",
    "TELEMETRY_ENABLED": "false",
    "CURATOR_CACHE_DIR": tempfile.mkdtemp(),
    "OPENAI_API_KEY": "none",
    "HF_HUB_OFFLINE": "1",
}


class Characters:
    """An encoding of four characters to a token."""

    def encode(self, text: str, **_: object) -> list[int]:
        return [0] * (len(text) // 4)


def count_offline() -> None:
    import tiktoken

    try:
        tiktoken.get_encoding("cl100k_base")
    except OSError:
        tiktoken.get_encoding = tiktoken.encoding_for_model = lambda *_, **__: Characters()


def used() -> float:
    return sum(one.ru_utime + one.ru_stime for one in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--concurrency", type=int, required=True)
    options = parser.parse_args()
    count_offline()
    from bespokelabs import curator

    llm = curator.LLM(
        model_name="loopback",
        backend="openai",
        backend_params={
            "base_url": options.base_url,
            "api_key": "none",
            "max_requests_per_minute": 10_000_000,
            "max_tokens_per_minute": 10_000_000_000,
            "max_concurrent_requests": options.concurrency,
            "max_retries": 3,
        },
        generation_params={"temperature": 0.0, "max_tokens": 256},
    )
    prompts = [f"My parcel number {i} is wrong." for i in range(options.rows)]
    cpu, began = used(), time.monotonic()
    answers = llm(prompts)
    wall, cpu = time.monotonic() - began, used() - cpu
    rows = getattr(answers, "dataset", answers)
    print(
        json.dumps(
            {
                "tool": f"curator {version('bespokelabs-curator')}",
                "rows": options.rows,
                "rows_ok": len(rows),
                "wall_s": wall,
                "cpu_s": cpu,
                "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
        )
    )


if __name__ == "__main__":
    main()
