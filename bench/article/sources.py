"""Public numbers that the article's claims are held against, each with where it was published."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Source:
    """What somebody published, in a line of ours, and where."""

    text: str
    url: str


ARTICLE = Source(
    "NVIDIA, Building for the Rising Complexity of Agentic Systems with Extreme Co-Design, 5 May 2026",
    "https://developer.nvidia.com/blog/building-for-the-rising-complexity-of-agentic-systems-with-extreme-co-design/",
)

AGENTX_MEASURED = Source(
    "SemiAnalysis AgentX, DeepSeek-V4-Pro measured: VR NVL72 gives 1.4 to 3 times GB300's tokens per TCO dollar at 60 to 100 "
    "tokens/s/user and 2.72 times at 200; of tokens per MW 59.4M against 28.5M (SGLang) or 21.1M (TensorRT-LLM) at 100, and 7.2 "
    "times at 150; at 170 between 5.56 and 67 times, by the engine that GB300 runs",
    "https://inferencex.semianalysis.com/blog/vera-rubin-nvl72-agentic-inference",
)
AGENTX_SPEEDS = Source(
    "the fastest that AgentX measured: 276 tokens/s/user at P90 on VR NVL72 without LPX, 172 on GB300 NVL72",
    "https://inferencex.semianalysis.com/blog/vera-rubin-nvl72-agentic-inference",
)
LPX_PROJECTION = Source(
    "NVIDIA's projection for a synthetic 2T mixture of experts, 400K cached and 4K new tokens: about 3 times VR NVL72's "
    "throughput with AFD or all of decode on LPX, about 5 times with LPX as drafter; nobody has measured it",
    "https://developer.nvidia.com/blog/how-nvidia-groq-3-lpx-unlocks-ultrafast-interactivity-at-long-context-on-nvidia-vera-rubin/",
)
HARDWARE_PRICES = Source(
    "SemiAnalysis InferenceX hardware registry: owner cost and three-year rental per GPU-hour, all-in power",
    "https://github.com/SemiAnalysisAI/InferenceX-app/pull/1123",
)
