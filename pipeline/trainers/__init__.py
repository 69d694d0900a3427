"""How parameters change: the arguments TRL's SFTTrainer gets, and our PPOTrainer."""
