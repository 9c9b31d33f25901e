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
    "35,339 requests of 586 Claude Code sessions: 95.5 to 96.1% of prompt blocks were seen before with an endless cache, "
    "91.2 to 91.3% if a block is dropped after 5 minutes without use; counted in the published traces",
    "https://github.com/callanjfox/kv-cache-tester",
)
#: Prompt tokens of the first 28 requests of 16 of those sessions, and how many of them an endless cache finds
#: (`bench/data/agent_mix.jsonl.gz`, counted by `orchestrator/sim/bounds.py`).
MIX_INPUT_TOKENS, MIX_CACHED_TOKENS = 34_412_246, 32_208_192
AGENTX_INPUT = Source(
    "SemiAnalysis AgentX: median prompt of 140K tokens, 99.2% of it could come from a cache",
    "https://inferencex.semianalysis.com/blog/ultra-high-interactivity-on-nvidia",
)
AGENTX_MEASURED = Source(
    "SemiAnalysis AgentX, DeepSeek-V4-Pro measured: VR NVL72 gives 1.4 to 3 times GB300's tokens per TCO dollar at 60 to 100 "
    "tokens/s/user, 2.72 times at 200, and 7.2 times its tokens per MW at 150",
    "https://inferencex.semianalysis.com/blog/vera-rubin-nvl72-agentic-inference",
)
#: Band of those measured ratios.
AGENTX_RATIO_LOW, AGENTX_RATIO_HIGH = 1.4, 7.2
AGENTX_SPEEDS = Source(
    "the fastest that AgentX measured: 276 tokens/s/user at P90 on VR NVL72 without LPX, 172 on GB300 NVL72",
    "https://inferencex.semianalysis.com/blog/vera-rubin-nvl72-agentic-inference",
)
RUBIN_CLAIM = Source(
    "NVIDIA's projection: a tenth of GB200 NVL72's cost per token, Kimi-K2-Thinking with 32K in and 8K out",
    "https://developer.nvidia.com/blog/inside-the-nvidia-rubin-platform-six-new-chips-one-ai-supercomputer/",
)
LPX_PROJECTION = Source(
    "NVIDIA's projection for a synthetic 2T mixture of experts, 400K cached and 4K new tokens: about 3 times VR NVL72's "
    "throughput with AFD or all of decode on LPX, about 5 times with LPX as drafter; nobody has measured it",
    "https://developer.nvidia.com/blog/how-nvidia-groq-3-lpx-unlocks-ultrafast-interactivity-at-long-context-on-nvidia-vera-rubin/",
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
