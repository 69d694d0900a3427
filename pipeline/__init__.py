"""Relay: one recipe runs SFT, PPO and an evaluation that says whether RL beat SFT."""
