# As Ollama's own image behaves, around a binary from elsewhere: for tests where no image registry can be reached.
# The context is that binary's prefix: bin/ollama and lib/ollama.
ARG BASE_IMAGE
FROM ${BASE_IMAGE}
COPY bin/ollama /usr/bin/ollama
COPY lib/ollama /usr/lib/ollama
ENV OLLAMA_HOST=0.0.0.0:11434
EXPOSE 11434
ENTRYPOINT ["/bin/ollama"]
CMD ["serve"]
