"""Learning from a policy's own answers: prompts, rollouts, rewards, experience, updates."""
