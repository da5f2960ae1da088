"""What measures a speculator, and what that needs: prompts, texts, methods to compare with. No decoding needs it."""
