#!/bin/sh
# A page that says which pod answers, at $HTTP_PORT.
[ -s /usr/share/nginx/html/multitool ] || {
	echo "Network MultiTool (a stand-in by Fathom, with nginx) - $(hostname) - $(hostname -i 2>/dev/null) - HTTP: ${HTTP_PORT:-80}" >/usr/share/nginx/html/index.html
	: >/usr/share/nginx/html/multitool
	[ -z "$HTTP_PORT" ] || sed -i "s/80;/$HTTP_PORT;/" /etc/nginx/conf.d/default.conf
}
exec "$@"
