"""The learned policy: everything it computes with, in torch and numpy alone."""
