"""Reinforcement learning: rollouts on some chips, learning on another."""
