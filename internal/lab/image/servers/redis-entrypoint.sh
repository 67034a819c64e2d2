#!/bin/sh
# As that of the image redis: options and a file of settings are redis-server's. That image is built to answer other hosts
# without a password; Debian's is not.
case $1 in
-* | *.conf) set -- redis-server "$@" ;;
esac
case $1 in
redis-server)
	shift
	set -- redis-server "$@" --protected-mode no
	;;
esac
exec "$@"
