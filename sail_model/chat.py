"""SAIL-VL2's prompt as a Jinja template, for any number of turns and for system messages of one's own.

A turn is `<|im_start|>role`, newline, content, `<|im_end|>`; nothing stands between turns. A picture in a message is
`<image>` and a newline. Without a system message the released one is used; an empty one leaves the turn out.
`apply_chat_template(messages, thinking=True)` asks SAIL-VL2-Thinking to reason: every user turn then ends with the
released request to do so, the earlier ones too, so that a conversation's prompt begins with the prompt before it.
The released templates write `<|im_system|>` and `<|im_assistant|>`, which are no tokens of the model: those are
corrected here, to what its own `chat` method writes.
"""

from typing import Any

IMAGE_PLACEHOLDER = "<image>"

SYSTEM_MESSAGE = "你是由抖音内容理解组开发的多模态大模型，英文名叫UniVL, 是一个有用无害的人工智能助手。"

# Follows the user's text without a separator (README of the release); the models answer <think>...</think>...\boxed{}.
THINKING_SUFFIX = (
    "You FIRST think about the reasoning process as an internal monologue and then provide the final answer. "
    "The reasoning process MUST BE enclosed within <think> </think> tags. "
    "The final answer MUST BE put in \\boxed{}."
)

CHAT_TEMPLATE = """\
{%- macro render(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- else -%}
    {%- for part in content -%}
      {%- if part.type == 'image' -%}
        {{- 'IMAGE\\n' -}}
      {%- elif part.type == 'text' -%}
        {{- part.text -}}
      {%- else -%}
        {{- raise_exception("SAIL-VL2 chat: a part must be of type 'image' or 'text', not '" ~ part.type ~ "'") -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- if messages[0].role != 'system' -%}
  {{- '<|im_start|>system\\nSYSTEM<|im_end|>' -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if message.role not in ('system', 'user', 'assistant') -%}
    {{- raise_exception("SAIL-VL2 chat: role must be 'system', 'user' or 'assistant', not '" ~ message.role ~ "'") -}}
  {%- endif -%}
  {%- set content = render(message.content) -%}
  {%- if message.role == 'assistant' -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- generation -%}
      {{- content ~ '<|im_end|>' -}}
    {%- endgeneration -%}
  {%- elif message.role == 'user' or content -%}
    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ content -}}
    {%- if thinking and message.role == 'user' -%}
      {{- 'THINKING' -}}
    {%- endif -%}
    {{- '<|im_end|>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
""".replace("IMAGE", IMAGE_PLACEHOLDER).replace("SYSTEM", SYSTEM_MESSAGE)
CHAT_TEMPLATE = CHAT_TEMPLATE.replace("THINKING", THINKING_SUFFIX.replace("\\", "\\\\"))


def with_data_urls(conversation: Any) -> Any:
    """A copy of the messages, or of a list of conversations, that has pictures given as base64 in `data:` URLs."""
    if isinstance(conversation, list | tuple):
        return [with_data_urls(item) for item in conversation]
    if isinstance(conversation, dict) and isinstance(conversation.get("content"), list | tuple):
        return conversation | {"content": [_with_data_url(part) for part in conversation["content"]]}
    return conversation


def _with_data_url(part: Any) -> Any:
    if not isinstance(part, dict) or part.get("type") != "image" or "base64" not in part:
        return part
    data = part["base64"]
    others = {key: value for key, value in part.items() if key != "base64"}
    return others | {"url": data if data.startswith("data:") else f"data:;base64,{data}"}
