"""Say what is installed, what this machine is fast at, and what to install for more.

hovle doctor          a report for people, and for issues
hovle doctor --json   the same for programs
"""

import argparse
import json
import platform
import shutil
from dataclasses import asdict, dataclass

from ..requirements import installed_version, optional_specifier, problem_with, required

OPTIONAL = {
    "accelerate": ("hovle[train]", "training"),
    "peft": ("hovle[train]", "LoRA"),
    "pyyaml": ("hovle[train]", "recipes of training"),
    "pydantic": ("hovle[train]", "recipes of training, hovle serve"),
    "datasets": ("hovle[data]", "training data in parquet files, tars and on the Hub"),
    "timm": ("hovle[teacher]", "teachers for distillation"),
    "open_clip_torch": ("hovle[teacher]", "OpenCLIP teachers"),
    "matplotlib": ("hovle[demo]", "reports of runs and the demo"),
    "gguf": ("hovle[demo]", "the demo's language model"),
    "llama_cpp_python": ("hovle[llamacpp]", "hovle chat --engine llama.cpp"),
    "openvino": ("hovle[openvino]", "hovle export --to openvino"),
    "openvino_tokenizers": ("hovle[openvino]", "hovle export --to openvino"),
    "openvino_genai": ("hovle[openvino]", "running what hovle export --to openvino wrote"),
    "onnxruntime": ("hovle[onnx]", "hovle chat --engine onnx"),
    "onnxscript": ("hovle[onnx]", "hovle export --to onnx"),
    "onnx": ("hovle[onnx]", "hovle export --to onnx"),
    "sentencepiece": ("hovle[convert]", "the tokenizer of released checkpoints"),
    "protobuf": ("hovle[convert]", "the tokenizer of released checkpoints"),
    "bitsandbytes": ("hovle[quant]", "alignment against an 8- or 4-bit language model"),
    "torchao": ("hovle[quant]", "answers with int8 or int4 weights"),
    "fastapi": ("hovle[serve]", "hovle serve"),
    "uvicorn": ("hovle[serve]", "hovle serve"),
    "openai": ("hovle[serve]", "hovle serve"),
    "prometheus_client": ("hovle[serve]", "hovle serve"),
    "gradio": ("hovle[app]", "hovle app, a page to try models in"),
    "lmms_eval": ("hovle[eval]", "hovle eval benchmarks"),
    "Levenshtein": ("hovle[eval]", "hovle eval benchmarks"),
    "rapidocr": ("hovle[ocr]", "hovle eval skills --ocr"),
    "embreex": ("hovle[smol]", "hovle data build"),
    "fonttools": ("hovle[smol]", "hovle data build"),
    "resvg_py": ("hovle[smol]", "hovle data build"),
    "vl_convert_python": ("hovle[smol]", "hovle data build"),
    "zstandard": ("hovle[deb]", "Debian packages compressed with zstd"),
    "simplejpeg": ("hovle[vision]", "faster JPEG files, and seeing damage in them that Pillow hides"),
    "pillow_heif": ("hovle[heic]", "HEIC pictures, as phones take them"),
    "flash_attn": ("hovle[flash]", "flash_attention_2 on NVIDIA GPUs"),
}
"""Package -> (what pip installs it with, what it is for)."""

PILLOW_PARTS = {
    "avif": "AVIF files cannot be read",
    "webp": "WebP files cannot be read",
    "jpg_2000": "JPEG 2000 files cannot be read",
    "libtiff": "most compressed TIFF files cannot be read",
    "littlecms2": "ICC profiles are left aside, so colours may be off",
}
"""Optional part of Pillow, by its name there -> what is lost without it."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    topic: str
    found: str
    advice: str = ""
    """What to do about it; empty when all is well."""
    is_problem: bool = False
    """Whether hovle cannot work like this."""


def examine() -> list[Finding]:
    """Look at versions, device, number format, compiler and optional packages."""
    findings = [Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    for requirement in required():
        problem = problem_with(requirement)
        version = installed_version(requirement.name) or "missing"
        findings.append(Finding(requirement.name, version, problem or "", is_problem=problem is not None))
    if any(finding.is_problem for finding in findings):
        return findings  # what follows needs them
    findings += _device()
    findings += _fast_paths()
    findings.append(_pillow_parts())
    findings += [_optional(package, *what) for package, what in OPTIONAL.items()]
    return findings


def _optional(package: str, requirement: str, purpose: str) -> Finding:
    version = installed_version(package.replace("_", "-"))
    if version is None:
        return Finding(package, "missing", f"for {purpose}: pip install '{requirement}'")
    expected = optional_specifier(package, requirement)
    if not expected.contains(version, prereleases=True):
        return Finding(package, version, f"for {purpose} hovle needs {expected}: pip install '{requirement}'")
    return Finding(package, version)


def _pillow_parts() -> Finding:
    """What Pillow was built with; its wheels have it all, other builds may not."""
    from PIL import features

    missing = {part: loss for part, loss in PILLOW_PARTS.items() if not features.check(part)}
    if not missing:
        return Finding("pictures", "AVIF, WebP, JPEG 2000, TIFF with compression, ICC profiles")
    advice = "; ".join(f"without {part} {loss}" for part, loss in missing.items())
    return Finding("pictures", f"Pillow lacks {', '.join(missing)}", f"{advice}: pip install --force-reinstall pillow")


def _device() -> list[Finding]:
    import torch

    from .speed import fastest_dtype

    if torch.cuda.is_available():
        device = torch.device("cuda")
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        name = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, {memory:.0f} GiB"
    else:
        device = torch.device("cpu")
        name = f"CPU, {torch.get_num_threads()} threads"
    dtype = str(fastest_dtype(device)).removeprefix("torch.")
    advice = "" if dtype == "bfloat16" else "this machine is not faster in bfloat16; float32 takes twice the memory"
    return [Finding("device", name), Finding("number format", dtype, advice)]


def _fast_paths() -> list[Finding]:
    import torch

    from .facts import compiler_problem

    problem = compiler_problem()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        tool, wanted = f"Triton {installed_version('triton') or 'not found'}", "triton, which comes with torch"
    else:
        tool = f"C++ compiler: {shutil.which('g++') or shutil.which('clang++') or 'none found'}"
        wanted = "a C++ compiler"
    compiled = (
        Finding("torch.compile", f"works ({tool})")
        if problem is None
        else Finding("torch.compile", f"fails: {problem}", f"training runs eager, which is slower: install {wanted}")
    )
    attention = ["sdpa", "eager"]
    if problem is None:  # transformers compiles it
        attention.append("flex_attention")
    if on_gpu and installed_version("flash-attn"):
        attention.append("flash_attention_2")
    return [compiled, Finding("attention", ", ".join(attention))]


def report(findings: list[Finding]) -> str:
    """The findings as aligned lines."""
    width = max(len(finding.topic) for finding in findings)
    lines = []
    for finding in findings:
        mark = "x" if finding.is_problem else "-" if finding.advice else "+"
        lines.append(f"{mark} {finding.topic:<{width}}  {finding.found}")
        if finding.advice:
            lines.append(f"  {'':<{width}}  {finding.advice}")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `hovle doctor`."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the report; exit code 1 when hovle cannot work here."""
    findings = examine()
    text = json.dumps([asdict(finding) for finding in findings], indent=1) if args.json else report(findings)
    print(text)  # noqa: T201 - this is the command's output
    return int(any(finding.is_problem for finding in findings))
