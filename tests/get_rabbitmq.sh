#!/bin/sh
# Gets RabbitMQ for the tests where it is missing and that is possible. No service is started: the tests start a
# private node. Where it is not possible it says what to do, and the tests that need it skip (under CI=true: fail).
set -eu
[ -n "${FLUFFLE_AMQP_URL:-}" ] && exit 0
[ -x /usr/lib/rabbitmq/bin/rabbitmq-server ] && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "RabbitMQ is missing and cannot be installed here: its tests skip. Install rabbitmq-server 3.10 or newer" \
        "(Debian, Ubuntu: as root, 'make rabbitmq'), or name a broker in FLUFFLE_AMQP_URL (tests/rabbit_node.py)." >&2
    exit 0
fi
echo "installing RabbitMQ for the tests (35 MB)"
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then # without one the package would start a broker on every interface
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    trap 'rm -f "$policy"' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends rabbitmq-server; } >/dev/null; then
    echo "RabbitMQ could not be installed: the tests that need it skip" >&2
fi
