"""What ``linear_kd_loss`` should take on an H100, written down before it ran on one.

``python -m benchmarks.head_predictions`` writes ``results/head-predictions.md``. The model: matrix
products at ``PRODUCTS`` flop/s, bytes at ``BANDWIDTH``. In each chunk the gradient of the weight is
read and written once in float32, 8 V H bytes; the row kernel of Triton streams both logits twice
and writes one gradient, and the products read and write the chunk's logits once each.
"""

from __future__ import annotations

from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
PRODUCTS = 700e12
"""Of bfloat16, what large products reach."""
BANDWIDTH = 3.0e12
LAUNCHES = 12
"""Of a chunk, at 5 microseconds each where the queue runs dry."""
SHAPES = ((8192, 4096, 4096, 128256), (8192, 2048, 4096, 151936), (16384, 4096, 4096, 32000))
"""Tokens, width of the student, of the teacher (0: logits are given), vocabulary."""
CHUNKS = (256, 1024, 2048, 4096)


def predict(tokens: int, student: int, teacher: int, vocab: int, chunk: int) -> dict[str, float]:
    """Milliseconds of forward and backward, and peak MiB beyond the inputs."""
    chunks = -(-tokens // chunk)
    products = 2 * tokens * vocab * (3 * student + teacher) / PRODUCTS
    accumulation = chunks * 8 * vocab * student / BANDWIDTH
    rows = tokens * vocab * 2 * 5 / BANDWIDTH
    logits = tokens * vocab * 2 * 4 / BANDWIDTH
    launches = chunks * LAUNCHES * 5e-6
    weight = 4 * vocab * student
    peak = weight + 2 * vocab * student + 2 * 2 * chunk * vocab + 2 * tokens * student
    return {
        "products": products * 1e3,
        "gradient": accumulation * 1e3,
        "rows": rows * 1e3,
        "logits": logits * 1e3,
        "total": (products + accumulation + rows + logits + launches) * 1e3,
        "peak": peak / 2**20,
    }


def table() -> str:
    columns = ["tokens x width (teacher) x V", "chunk", "products", "weight's gradient", "rows"]
    columns += ["logits", "total, ms", "peak, MiB"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for tokens, student, teacher, vocab in SHAPES:
        for chunk in CHUNKS:
            p = predict(tokens, student, teacher, vocab, chunk)
            lines.append(
                f"| {tokens} x {student} ({teacher}) x {vocab} | {chunk} | {p['products']:.1f} |"
                f" {p['gradient']:.1f} | {p['rows']:.1f} |"
                f" {p['logits']:.1f} | {p['total']:.1f} | {p['peak']:.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    note = (
        "Predicted, not measured (`python -m benchmarks.head_predictions`): `linear_kd_loss` in "
        f"bfloat16 on an H100, products at {PRODUCTS / 1e12:.0f} Tflop/s, {BANDWIDTH / 1e12} TB/s. "
        "Every chunk reads and writes the weight's float32 gradient, so that small chunks cost "
        "time: the default is 1 GiB of logits, at most 4096 tokens. The first run on a GPU decides "
        "about the default, and whether the products of a chunk should be queued beside the rows "
        "of the one before.\n\n"
    )
    (RESULTS / "head-predictions.md").write_text(note + table() + "\n")
    print(table())


if __name__ == "__main__":
    main()
