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

#: What a cached prompt token costs against a fresh one, and what writing one to the cache costs (five-minute lifetime).
CACHE_READ_PRICE = 0.1
CACHE_WRITE_PRICE = 1.25
API_PRICES = Source(
    "Anthropic's price list: a cache read is 0.1 of an input token, a five-minute cache write 1.25",
    "https://platform.claude.com/docs/en/about-claude/pricing",
)

#: Chat requests of an hour of Kimi: how many, and their prompt and answer tokens; counted in the published file.
CHAT_REQUESTS, CHAT_INPUT_TOKENS, CHAT_OUTPUT_TOKENS = 12_031, 144_793_823, 4_122_048
CHAT_TRACE = Source(
    "an hour of Kimi chat, 12,031 requests: 12,035 prompt and 343 answer tokens each, counted in the published trace",
    "https://github.com/kvcache-ai/Mooncake/tree/3b5a594133958449a1feaf1c9e0fc1b553e34a28/FAST25-release/traces",
)
MULTI_AGENT = Source(
    "Anthropic: agents take about 4 times the tokens of a chat, multi-agent systems about 15 times",
    "https://www.anthropic.com/engineering/multi-agent-research-system",
)

CODING_AGENTS = Source(
    "35,339 requests of 586 Claude Code sessions: share of the prompt blocks that were seen before, counted in November 2026 in "
    "the published traces (commits 7647c82 and 94f6046)",
    "https://github.com/callanjfox/kv-cache-tester",
)
#: What those sessions find, (least, most) over the two sets of traces, by how long a block is kept after its last use.
REAL_HIT_RATES = {
    "with an endless cache": (0.955, 0.961),
    "if a block is dropped after an hour without use": (0.952, 0.959),
    "if it is dropped after five minutes": (0.912, 0.913),
}
#: Prompt tokens of the first 28 requests of 16 of those sessions, and how many of them an endless cache finds: counted by
#: `orchestrator/sim/bounds.py` in `bench/data/agent_mix.jsonl.gz`, which is not shipped; a test counts again.
MIX_SESSIONS, MIX_REQUESTS = 16, 28
MIX_INPUT_TOKENS, MIX_CACHED_TOKENS = 34_412_246, 32_208_192
AGENTX_INPUT = Source(
    "SemiAnalysis AgentX: median prompt of 140K tokens, 99.2% of it could come from a cache",
    "https://inferencex.semianalysis.com/blog/ultra-high-interactivity-on-nvidia",
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
#: (tokens/s/user, least, most) of VR over GB300 as AgentX measured it: tokens for a dollar, tokens/s for a MW. A single number
#: stands twice.
AGENTX_PER_DOLLAR = ((60.0, 1.4, 3.0), (100.0, 1.4, 3.0), (200.0, 2.72, 2.72))
AGENTX_PER_MW = ((100.0, 59.4 / 28.5, 59.4 / 21.1), (150.0, 7.2, 7.2))
#: The fastest, tokens/s/user at P90.
AGENTX_FASTEST_VR, AGENTX_FASTEST_GB300 = 276.24, 171.53
FAST_AFD = Source(
    "FastAFD, measured on GB200 NVL72: attention and experts on GPUs of their own give 1.35 to 1.45 times the decoded tokens "
    "of a GPU, 1.41 with Qwen3-235B in FP8 at 8K, seven attention GPUs for one of experts",
    "https://haoailab.com/blogs/fastafd/",
)
FAST_AFD_GAIN, FAST_AFD_LOW, FAST_AFD_HIGH = 1.41, 1.35, 1.45
#: Part of a pass of GPUs that do both which stays with the attending ones, as measured there: attention 41 to 48%, dense 16%.
FAST_AFD_ATTENTION = (0.57, 0.64)
RUBIN_CLAIM = Source(
    "NVIDIA's projection: a tenth of GB200 NVL72's cost per token, Kimi-K2-Thinking with 32K in and 8K out",
    "https://developer.nvidia.com/blog/inside-the-nvidia-rubin-platform-six-new-chips-one-ai-supercomputer/",
)
LPX_PROJECTION = Source(
    "NVIDIA's projection for a synthetic 2T mixture of experts, 400K cached and 4K new tokens: about 3 times VR NVL72's "
    "throughput with AFD or all of decode on LPX, about 5 times with LPX as drafter; nobody has measured it",
    "https://developer.nvidia.com/blog/how-nvidia-groq-3-lpx-unlocks-ultrafast-interactivity-at-long-context-on-nvidia-vera-rubin/",
)
#: That projection's gains over VR NVL72 alone.
LPX_AFD_GAIN, LPX_WHOLE_GAIN, LPX_DRAFTER_GAIN = 3.0, 3.0, 5.0
LPX_PAIRING = Source(
    "one LPX rack of 256 chips stands beside an NVL72 of 72 GPUs; by analysts, NVIDIA has not said it",
    "https://newsletter.semianalysis.com/p/nvidia-the-inference-kingdom-expands",
)
FUSED_KERNEL = Source(
    "TileRT on 8 B200 with GLM-5: 340 tokens/s/user at 8K context with one request at a time and fused communication",
    "https://inferencex.semianalysis.com/blog/ultra-high-interactivity-on-nvidia",
)
ALL_TO_ALL_FLOOR = Source(
    "TensorRT-LLM on GB200: dispatch and combine of a layer's experts take about 50 us however small the batch",
    "https://github.com/NVIDIA/TensorRT-LLM/tree/main/docs/source/blogs/tech_blog",
)
HARDWARE_PRICES = Source(
    "SemiAnalysis InferenceX hardware registry: owner cost and three-year rental per GPU-hour, all-in power",
    "https://github.com/SemiAnalysisAI/InferenceX-app/pull/1123",
)
CMX_PORT = Source(
    "BlueField-4 has a port of 800 Gb/s; what one GPU gets of context memory storage is not published",
    "https://developer.nvidia.com/blog/inside-the-nvidia-rubin-platform-six-new-chips-one-ai-supercomputer/",
)


@dataclass(frozen=True, slots=True)
class RequestRates:
    """Requests a second that one GPU computes with their context loaded, and with it computed again."""

    model: str
    #: Built-in shape of that model; empty if its shape is not published.
    shape: str
    cached_tokens: int
    new_tokens: int
    output_tokens: int
    loaded: float
    computed: float


STORE_SIMULATOR = Source(
    "constants in a public KV-store simulator: requests a second of one GPU with the cached context loaded and with it computed "
    "again; GPU and method are not stated there",
    "a GitHub repository named storage-sim, read in 2026; its address was not kept",
)
STORE_RATES = (
    RequestRates("DeepSeek-V3", "deepseek-v3", 131_072, 2_048, 1_000, 1.6988, 0.0956),
    RequestRates("Kimi-K2", "kimi-k2", 131_072, 2_048, 1_000, 3.1607, 0.3558),
    RequestRates("Kimi-K2", "kimi-k2", 204_800, 4_096, 200, 3.2222, 0.1711),
    RequestRates("GPT-OSS-2T", "", 409_600, 4_096, 200, 2.4520, 0.0596),
    RequestRates("Kimi-K2", "kimi-k2", 1_048_576, 4_096, 200, 0.6678, 0.0074),
)
