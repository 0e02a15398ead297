"""The registered model as MLflow loads it (models from code): chat messages in, an answer out.

Holds no weights: `model_config` says where they lie and what their hash must be. MLflow runs this file when it loads a
version, in an environment that has lladaflow.
"""

import os
from pathlib import Path

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext
from pydantic import BaseModel


class Message(BaseModel):
    """One turn of a conversation."""

    role: str
    content: str


class Conversation(BaseModel):
    """What is asked: the turns so far."""

    messages: list[Message]


class ChatModel(PythonModel):
    """Answers conversations as the version's usage says: sampler settings, turns, system prompt."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights, once their hash is verified."""
        from llada_core.modeling import load_to_answer
        from llada_core.tokenizer import Tokenizer
        from llada_core.usage import Usage
        from tasks.folders import content_hash

        config = context.model_config
        # This file lies in the project that registered the version, wherever that is now; a copy has its own weights.
        homes = [*Path(__file__).resolve().parents, Path(os.environ.get("LLADAFLOW_HOME", "."))]
        stores = [home / "store" / config["hash"] for home in homes]
        folder = next((store for store in stores if store.is_dir()), Path(config["path"]))
        if not folder.is_dir() or content_hash(folder) != config["hash"]:
            raise ValueError(
                f"{folder}: the registered weights are gone or were altered; set LLADAFLOW_HOME or run again"
            )
        # `mlflow.pyfunc.load_model(uri, model_config={"device": "cpu"})` and LLADAFLOW_DEVICE say otherwise
        self.model = load_to_answer(folder, device=config.get("device") or "auto", bits=config.get("bits"))
        self.tokenizer = Tokenizer.load(folder)
        usage = {**config.get("usage", {}), "sampling": config["sampling"]}  # which a caller may set by its own name
        self.usage = Usage.parse(usage, "model_config")

    def predict(self, model_input: list[Conversation]) -> list[Message]:
        """The assistant's next turn of each conversation."""
        import llada_core

        turns = [[message.model_dump() for message in conversation.messages] for conversation in model_input]
        prompts = [self.tokenizer.chat_ids(self.usage.messages(messages)) for messages in turns]
        answers = llada_core.generate(self.model, prompts, self.usage.sampling).answers
        texts = [self.tokenizer.answer_text(answer.tolist()) for answer in answers]
        return [Message(role="assistant", content=text) for text in texts]


set_model(ChatModel())
