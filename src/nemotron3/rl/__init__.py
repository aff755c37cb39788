"""Reinforcement learning: rollouts in environments, advantages, and the policy's loss."""
