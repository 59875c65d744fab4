"""The HTTP server: OpenAI's API and a page, over one engine. `import lama` imports nothing from here."""
