# The plugin's root file system from a public Debian image. plugin/image/rootfs.sh makes the same without
# one. Debian 13 is the first release that has every package that FreeFlow needs.
ARG BASE=debian:trixie-slim
FROM ${BASE}
COPY plugin/image/packages.txt /tmp/packages.txt
RUN apt-get update \
    && xargs -a /tmp/packages.txt apt-get install -y --no-install-recommends \
    && rm -rf /var/lib/apt/lists/* /usr/share/doc/* /usr/share/man/* /usr/share/locale/* /tmp/packages.txt \
    && mkdir -p /host/run /host/bin /host/dev /host/swarm /state /run/docker/plugins
COPY . /tmp/checkout
RUN /tmp/checkout/plugin/image/install-code.sh /tmp/checkout / && rm -rf /tmp/checkout
ENTRYPOINT ["/usr/bin/python3", "-P", "-m", "plugin"]
