"""Exact-or-miss KV-cache storage tiers for LLM serving engines."""
