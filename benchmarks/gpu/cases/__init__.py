"""What is timed: ours beside eager torch, torch.compile, and the peers that are installed."""
