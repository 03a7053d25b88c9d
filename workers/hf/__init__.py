"""Large models: Hugging Face transformers, trained whole or by PEFT adapters. Needs the extra `fluffle[llm]`.

Only what is trained travels. What each participant must have, the base model, is told by its digest.
"""
