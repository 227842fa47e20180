"""Reward models, one file a kind, and the words in which one is written."""

from fedcmp.federate.preference.candidates import Asking, Candidates, log_probs
from fedcmp.federate.preference.rewards.base import REWARDS, Judge, Reward, Setting

__all__ = ["REWARDS", "Asking", "Candidates", "Judge", "Reward", "Setting", "log_probs"]
