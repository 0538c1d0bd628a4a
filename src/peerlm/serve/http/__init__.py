"""The engine over HTTP, in OpenAI's words: requests in, tokens out, a page to try it, metrics."""
