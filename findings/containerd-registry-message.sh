#!/bin/sh
# What a registry says about a refused image reaches the user only with status 403.
#
# Library:  github.com/containerd/containerd/v2 v2.4.2, core/remotes/docker, which the CRI plugin pulls with.
# Expected: A registry answers an error with a JSON body of codes and messages (OCI distribution specification, "Error Codes"),
#           and the user sees the message, such as Docker Hub's "You have reached your pull rate limit" (429). When content
#           is fetched, the message is shown for every status but 404.
# Instead:  An image's name is resolved first, with HEAD, whose answer has no body. For 403 alone a GET follows that fetches
#           the message (https://github.com/containerd/containerd/pull/13547). Every other status is shown bare, and 404 as
#           "not found". So the message of a limit that is reached between the two requests is shown, and that of one that
#           was reached before is not.
# Means:    A registry or mirror that wants `kubectl describe pod` to show what to do about an error answers 403, whatever
#           the status should be. Whoever sees a bare "429 Too Many Requests" or "not found" has to ask the registry again
#           with GET (curl).
#
# Needs Go; no root. Talks to 127.0.0.1.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
cd "$work"
export CGO_ENABLED=0 GOWORK=off GOFLAGS=-mod=mod

cat >main.go <<'EOT'
package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const message = "the quota of team blue is used up"

func check(err error) {
	if err != nil {
		fmt.Println("not shown:", err)
		os.Exit(1)
	}
}

// registry refuses every request with a status and a message, as the OCI distribution specification has it.
func registry(status int) net.Listener {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	check(err)
	go func() {
		_ = http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(status)
			if r.Method != http.MethodHead {
				fmt.Fprintf(w, `{"errors":[{"code":"DENIED","message":%q}]}`, message)
			}
		}))
	}()
	return l
}

func shown(err error) string {
	if err == nil {
		return "no error"
	}
	if strings.Contains(err.Error(), message) {
		return "shown"
	}
	return "missing"
}

func main() {
	log.L.Logger.SetOutput(io.Discard)
	ctx := context.Background()
	changed := false
	fmt.Println("status  message when resolved  message when fetched")
	for _, status := range []int{400, 403, 404, 429, 503} {
		l := registry(status)
		resolver := docker.NewResolver(docker.ResolverOptions{Hosts: docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchAllHosts))})
		name := l.Addr().String() + "/team/app:1"
		_, _, resolved := resolver.Resolve(ctx, name)
		fetcher, err := resolver.Fetcher(ctx, name)
		check(err)
		body, fetched := fetcher.Fetch(ctx, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("{}"), Size: 2})
		if fetched == nil { // the request is made by the first read
			_, fetched = io.ReadAll(body)
		}
		fmt.Printf("%-7d %-21s %s\n", status, shown(resolved), shown(fetched))
		want := map[bool]string{true: "shown", false: "missing"}
		changed = changed || shown(resolved) != want[status == 403] || shown(fetched) != want[status != 404]
		check(l.Close())
	}
	if changed {
		fmt.Println("CHANGED")
		os.Exit(1)
	}
	fmt.Println("as described")
}
EOT
go mod init finding >/dev/null 2>&1
go get github.com/containerd/containerd/v2@v2.4.2 >log 2>&1 || { cat log; exit 1; }
go mod tidy >log 2>&1 || { cat log; exit 1; }
go build -o finding .
go list -m github.com/containerd/containerd/v2
./finding
