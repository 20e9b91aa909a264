"""The load of benchmarks/annotate.py with bespokelabs-curator.

    python -m venv curator && curator/bin/pip install bespokelabs-curator==0.1.31
    curator/bin/python benchmarks/peers/curator_peer.py \\
        --base-url http://127.0.0.1:8000/v1 --rows 2000 --concurrency 64

Its limits on requests and tokens per minute are raised, since it treats an endpoint with unknown
limits as slow. Its cache is a fresh folder; telemetry is off. It counts tokens with the table that
litellm contains, so nothing is downloaded. Before the load it sends one request without messages to
read the endpoint's limits.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

# Located, not imported: the settings below must precede the import.
litellm = importlib.util.find_spec("litellm")
assert litellm is not None and litellm.origin is not None
os.environ |= {
    "TELEMETRY_ENABLED": "False",
    "CURATOR_CACHE_DIR": tempfile.mkdtemp(),
    "OPENAI_API_KEY": "none",
    "HF_HUB_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "TIKTOKEN_CACHE_DIR": str(Path(litellm.origin).parent / "litellm_core_utils" / "tokenizers"),
}


def cpu_seconds() -> float:
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--concurrency", type=int, required=True)
    options = parser.parse_args()
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
    cpu_before = cpu_seconds()
    began = time.monotonic()
    answers = llm(prompts)
    wall = time.monotonic() - began
    cpu = cpu_seconds() - cpu_before
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
