"""What the chat templates of `chat_templates` are to render, and which of it is trained.

What stands between ⟦ and ⟧ is trained: a turn from the end of the generation prompt to its end-of-turn token.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from tests.support import chat_templates as published

SYSTEM = {"role": "system", "content": "Be kind."}
TALK = [
    {"role": "user", "content": "Hello there!"},
    {"role": "assistant", "content": "How are you?"},
    {"role": "user", "content": "Two plus two?"},
    {"role": "assistant", "content": "It is four.\n\nBye."},
]
CALL = {"type": "function", "id": "abcdefgh1", "function": {"name": "add", "arguments": {"a": 2, "how": "fast"}}}
TOOLS = [{"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}]
TOOL_TALK = [
    {"role": "user", "content": "Two plus two?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "4", "tool_call_id": "abcdefgh1"},
    {"role": "assistant", "content": "It is four."},
]
ADD = json.dumps({"type": "function", "function": TOOLS[0]})
WIDE_ADD = json.dumps({"type": "function", "function": TOOLS[0]}, indent=4)


@dataclass(frozen=True)
class Family:
    """A published template with its special tokens (bos, eos among them) and what its renderings are to be."""

    template: str
    special: str
    eos: str
    talk: str
    system: str | None = None  # None: the template refuses a system prompt
    tools: str | None = None  # None: it has no place for tools
    bos: str | None = None
    added: tuple[str, ...] = ()
    rstrip: tuple[str, ...] = ()


_CHATML_TALK = (
    "<|im_start|>user\nHello there!<|im_end|>\n<|im_start|>assistant\n⟦How are you?<|im_end|>⟧\n"
    "<|im_start|>user\nTwo plus two?<|im_end|>\n<|im_start|>assistant\n⟦It is four.\n\nBye.<|im_end|>⟧\n"
)
_CHATML_SYSTEM = "<|im_start|>system\nBe kind.<|im_end|>\n"
_QWEN_TOOL_TALK = (
    f"<|im_start|>system\n# Tools\n\n<tools>\n{ADD}\n</tools><|im_end|>\n<|im_start|>user\nTwo plus two?<|im_end|>\n"
    '<|im_start|>assistant\n⟦<tool_call>\n{"name": "add", "arguments": {"a": 2, "how":'
    ' "fast"}}\n</tool_call><|im_end|>⟧\n'
    "<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
)
_LLAMA_TALK = (
    "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHello there!<|eot_id|><|start_header_id|>assistant"
    "<|end_header_id|>\n\n⟦How are you?<|eot_id|>⟧<|start_header_id|>user<|end_header_id|>\n\nTwo plus two?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦It is four.\n\nBye.<|eot_id|>⟧"
)
_LLAMA_DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
_GEMMA_TALK = (
    "Hello there!<end_of_turn>\n<start_of_turn>model\n⟦How are you?<end_of_turn>⟧\n<start_of_turn>user\nTwo plus two?"
    "<end_of_turn>\n<start_of_turn>model\n⟦It is four.\n\nBye.<end_of_turn>⟧\n"
)
_PHI3_TALK = (
    "<|user|>\nHello there!<|end|>\n<|assistant|>\n⟦How are you?<|end|>⟧\n<|user|>\nTwo plus two?<|end|>\n"
    "<|assistant|>\n⟦It is four.\n\nBye.<|end|>⟧\n<|endoftext|>"
)
_PHI4_TALK = (
    "<|im_start|>user<|im_sep|>Hello there!<|im_end|><|im_start|>assistant<|im_sep|>⟦How are you?<|im_end|>⟧"
    "<|im_start|>user<|im_sep|>Two plus two?<|im_end|><|im_start|>assistant<|im_sep|>⟦It is four.\n\nBye.<|im_end|>⟧"
)
_ZEPHYR_TALK = (
    "<|user|>\nHello there!</s>\n<|assistant|>⟦\nHow are you?</s>⟧\n<|user|>\nTwo plus two?</s>\n"
    "<|assistant|>⟦\nIt is four.\n\nBye.</s>⟧\n"
)
_DEEPSEEK_TALK = (
    "<｜User｜>Hello there!<｜Assistant｜>⟦How are you?<｜end▁of▁sentence｜>⟧<｜User｜>Two plus two?<｜Assistant｜>"
    "⟦It is four.\n\nBye.<｜end▁of▁sentence｜>⟧"
)
_GLM_TALK = (
    "<|user|>\nHello there!<|assistant|>⟦\nHow are you?<|user|>⟧\nTwo plus two?<|assistant|>"
    "⟦\nIt is four.\n\nBye.<|endoftext|>⟧"
)
HARMONY_HEAD = "<|start|>system<|message|>You are ChatGPT.\nCurrent date: 2024-07-26<|end|>"
_HARMONY_TALK = (
    "<|start|>user<|message|>Hello there!<|end|><|start|>assistant⟦<|channel|>final<|message|>How are you?<|end|>⟧"
    "<|start|>user<|message|>Two plus two?<|end|><|start|>assistant"
    "⟦<|channel|>final<|message|>It is four.\n\nBye.<|return|>⟧"
)
_GRANITE_TALK = (
    "<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>Hello there!<|end_of_text|>\n"
    "<|start_of_role|>assistant<|end_of_role|>⟦How are you?<|end_of_text|>⟧\n"
    "<|start_of_role|>user<|end_of_role|>Two plus two?<|end_of_text|>\n"
    "<|start_of_role|>assistant<|end_of_role|>⟦It is four.\n\nBye.<|end_of_text|>⟧\n"
)
_COMMAND_TURN = "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>"
_COMMAND_ANSWER = "<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
_COMMAND_TALK = (
    f"{_COMMAND_TURN}Hello there!{_COMMAND_ANSWER}⟦How are you?<|END_OF_TURN_TOKEN|>⟧"
    f"{_COMMAND_TURN}Two plus two?{_COMMAND_ANSWER}⟦It is four.\n\nBye.<|END_OF_TURN_TOKEN|>⟧"
)
_MISTRAL_TALK = "<s>[INST] Hello there![/INST]⟦ How are you?</s>⟧[INST] Two plus two?[/INST]⟦ It is four.\n\nBye.</s>⟧"
_IM = "<|endoftext|> <|im_start|> <|im_end|>"
FAMILIES = {
    "llama-3.1": Family(
        published.LLAMA31,
        "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eom_id|> <|eot_id|>",
        "<|eot_id|>",
        f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{_LLAMA_DATES}{_LLAMA_TALK}",
        f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{_LLAMA_DATES}Be kind.{_LLAMA_TALK}",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nEnvironment:"
        f" ipython\n{_LLAMA_DATES}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nGiven the following functions,"
        f" respond with a call.\n\n{WIDE_ADD}\n\nTwo plus"
        ' two?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦{"name": "add", "parameters": {"a": 2,'
        ' "how":'
        ' "fast"}}<|eot_id|>⟧<|start_header_id|>ipython<|end_header_id|>\n\n"4"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦It'
        " is four.<|eot_id|>⟧",
        bos="<|begin_of_text|>",
    ),
    "qwen2.5": Family(
        published.QWEN25,
        _IM,
        "<|im_end|>",
        f"<|im_start|>system\nYou are Qwen.<|im_end|>\n{_CHATML_TALK}",
        _CHATML_SYSTEM + _CHATML_TALK,
        _QWEN_TOOL_TALK + "⟦It is four.<|im_end|>⟧\n",
        added=("<tool_call>", "</tool_call>"),
    ),
    "qwen3": Family(
        published.QWEN3,
        _IM,
        "<|im_end|>",
        _CHATML_TALK.replace("⟦It", "⟦<think>\n\n</think>\n\nIt"),
        _CHATML_SYSTEM + _CHATML_TALK.replace("⟦It", "⟦<think>\n\n</think>\n\nIt"),
        _QWEN_TOOL_TALK + "⟦<think>\n\n</think>\n\nIt is four.<|im_end|>⟧\n",
        added=("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
    ),
    "mistral-v3": Family(
        published.MISTRAL_V3,
        "<s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS]",
        "</s>",
        _MISTRAL_TALK,
        _MISTRAL_TALK,  # it shows the system prompt in the last user turn only while that is the last message
        f"<s>[AVAILABLE_TOOLS] [{ADD}][/AVAILABLE_TOOLS][INST] Two plus two?[/INST]"
        '⟦[TOOL_CALLS] [{"name": "add", "arguments": {"a": 2, "how": "fast"}, "id": "abcdefgh1"}]</s>⟧'
        '[TOOL_RESULTS] {"content": 4, "call_id": "abcdefgh1"}[/TOOL_RESULTS]⟦ It is four.</s>⟧',
        bos="<s>",
    ),
    "gemma-2": Family(
        published.GEMMA2,
        "<bos> <eos> <start_of_turn> <end_of_turn>",
        "<eos>",
        f"<bos><start_of_turn>user\n{_GEMMA_TALK}",
        bos="<bos>",
    ),
    "gemma-3": Family(
        published.GEMMA3,
        "<bos> <eos> <start_of_turn> <end_of_turn>",
        "<eos>",
        f"<bos><start_of_turn>user\n{_GEMMA_TALK}",
        f"<bos><start_of_turn>user\nBe kind.\n\n{_GEMMA_TALK}",
        bos="<bos>",
    ),
    "phi-3": Family(
        published.PHI3,
        "<|endoftext|> <|user|> <|assistant|> <|system|> <|end|>",
        "<|endoftext|>",
        _PHI3_TALK,
        f"<|system|>\nBe kind.<|end|>\n{_PHI3_TALK}",
        rstrip=("<|user|>", "<|assistant|>", "<|system|>"),
    ),
    "phi-4": Family(
        published.PHI4,
        "<|endoftext|> <|im_start|> <|im_sep|> <|im_end|>",
        "<|im_end|>",
        _PHI4_TALK,
        f"<|im_start|>system<|im_sep|>Be kind.<|im_end|>{_PHI4_TALK}",
    ),
    "chatml": Family(published.CHATML, _IM, "<|im_end|>", _CHATML_TALK, _CHATML_SYSTEM + _CHATML_TALK),
    "smollm2": Family(
        published.SMOLLM2,
        _IM,
        "<|im_end|>",
        f"<|im_start|>system\nYou are SmolLM.<|im_end|>\n{_CHATML_TALK}",
        _CHATML_SYSTEM + _CHATML_TALK,
    ),
    "zephyr": Family(
        published.ZEPHYR, "<s> </s>", "</s>", _ZEPHYR_TALK, f"<|system|>\nBe kind.</s>\n{_ZEPHYR_TALK}", bos="<s>"
    ),
    "deepseek-v3": Family(
        published.DEEPSEEK_V3,
        "<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        f"<｜begin▁of▁sentence｜>{_DEEPSEEK_TALK}",
        f"<｜begin▁of▁sentence｜>Be kind.{_DEEPSEEK_TALK}",
        bos="<｜begin▁of▁sentence｜>",
        added=(
            "<｜User｜>",
            "<｜Assistant｜>",
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁calls▁end｜>",
            "<｜tool▁call▁end｜>",
        ),
    ),
    "glm-4": Family(
        published.GLM4,
        "<|endoftext|> [gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|>",
        "<|endoftext|>",
        f"[gMASK]<sop>{_GLM_TALK}",
        f"[gMASK]<sop><|system|>\nBe kind.{_GLM_TALK}",
    ),
    "gpt-oss": Family(
        published.HARMONY,
        "<|endoftext|> <|return|> <|start|> <|end|> <|channel|> <|message|> <|call|>",
        "<|return|>",
        HARMONY_HEAD + _HARMONY_TALK,
        f"{HARMONY_HEAD}<|start|>developer<|message|># Instructions\n\nBe kind.\n\n<|end|>{_HARMONY_TALK}",
        f"{HARMONY_HEAD}<|start|>developer<|message|># Tools\n\nnamespace functions {{\ntype add = () =>"
        " any;\n}<|end|><|start|>user<|message|>Two plus two?<|end|><|start|>assistant⟦"
        ' to=functions.add<|channel|>commentary json<|message|>{"a": 2, "how":'
        ' "fast"}<|call|>⟧<|start|>functions.add'
        ' to=assistant<|channel|>commentary<|message|>"4"<|end|><|start|>assistant⟦<|channel|>final<|message|>It is'
        " four.<|return|>⟧",
    ),
    "granite-3": Family(
        published.GRANITE,
        "<|end_of_text|> <|start_of_role|> <|end_of_role|> <|tool_call|>",
        "<|end_of_text|>",
        f"<|start_of_role|>system<|end_of_role|>You are Granite.{_GRANITE_TALK}",
        f"<|start_of_role|>system<|end_of_role|>Be kind.{_GRANITE_TALK}",
    ),
    "command-r": Family(
        published.COMMAND_R,
        "<BOS_TOKEN> <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> <|SYSTEM_TOKEN|>",
        "<|END_OF_TURN_TOKEN|>",
        f"<BOS_TOKEN>{_COMMAND_TALK}",
        f"<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be kind.<|END_OF_TURN_TOKEN|>{_COMMAND_TALK}",
        bos="<BOS_TOKEN>",
    ),
}
