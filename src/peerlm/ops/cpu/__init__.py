"""The backend of native CPU kernels: `csrc/` compiled, and oneDNN for the query's product."""
