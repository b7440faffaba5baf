"""Simulations of TreeLoRA's parts on problems whose truth is known: numbers only, no model, no figures."""
