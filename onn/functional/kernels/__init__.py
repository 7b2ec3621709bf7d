"""How a bank is computed: dense, or its active pairs alone through raw operators; `onn.functional.bank` chooses."""
