"""How the policy is trained and compared."""
