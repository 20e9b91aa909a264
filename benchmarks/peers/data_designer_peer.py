"""The load of benchmarks/annotate.py with NVIDIA NeMo Data Designer.

    python -m venv designer && designer/bin/pip install data-designer==0.9.6
    designer/bin/python benchmarks/peers/data_designer_peer.py \\
        --base-url http://127.0.0.1:8000/v1 --rows 2000 --concurrency 64

The rows are a seed data set, the replies one text column. `max_parallel_requests` is the
concurrency; row groups and tasks in flight are raised so that they do not limit it. The model's
health check is off.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import os
import resource
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ |= {"NEMO_TELEMETRY_ENABLED": "false", "HOME": tempfile.mkdtemp(), "HF_HUB_OFFLINE": "1"}


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
    import data_designer.config as dd
    from data_designer.interface import DataDesigner

    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "rows.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text"])
            writer.writerows([f"My parcel number {i} is wrong."] for i in range(options.rows))
        provider = dd.ModelProvider(
            name="loopback", endpoint=options.base_url, provider_type="openai", api_key="none"
        )
        designer = DataDesigner(artifact_path=folder / "artifacts", model_providers=[provider])
        designer.set_run_config(
            dd.RunConfig(
                buffer_size=max(1000, 4 * options.concurrency),
                max_in_flight_tasks=max(1024, 4 * options.concurrency),
            )
        )
        model = dd.ModelConfig(
            alias="teacher",
            model="loopback",
            provider="loopback",
            skip_health_check=True,
            inference_parameters=dd.ChatCompletionInferenceParams(
                temperature=0.0, max_tokens=256, max_parallel_requests=options.concurrency
            ),
        )
        builder = dd.DataDesignerConfigBuilder(model_configs=[model])
        builder.with_seed_dataset(dd.LocalFileSeedSource(path=str(folder / "rows.csv")))
        builder.add_column(
            dd.LLMTextColumnConfig(name="answer", prompt="{{ text }}", model_alias="teacher")
        )
        cpu_before = cpu_seconds()
        began = time.monotonic()
        result = designer.create(builder, num_records=options.rows)
        wall = time.monotonic() - began
        cpu = cpu_seconds() - cpu_before
        rows_ok = len(result.load_dataset())
    print(
        json.dumps(
            {
                "tool": f"data-designer {version('data-designer')}",
                "rows": options.rows,
                "rows_ok": rows_ok,
                "wall_s": wall,
                "cpu_s": cpu,
                "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
        )
    )


if __name__ == "__main__":
    main()
