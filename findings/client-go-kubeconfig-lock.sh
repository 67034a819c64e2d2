#!/bin/sh
# clientcmd locks a kubeconfig by the name it was given: under two names one file has two locks.
#
# Library:  k8s.io/client-go v0.36.3, tools/clientcmd, ModifyConfig; so kubectl config and all that write with it.
# Expected: the lock keeps a second writer out of the file.
# Instead:  the lock is a file beside the name, NAME.lock, and the name is neither made absolute nor are symbolic links
#           followed. A writer that comes by a link and one that comes by its target are both let in. Of two by one
#           name the second is refused.
# Known:    a remark in ModifyConfig's source says that symbolic links are not handled; its documentation does not.
# Means:    a ~/.kube/config that is a link (dotfile managers, mounted homes) is not protected from a tool that resolves
#           it first. A tool that locks as kubectl does must use the name that the user gave, and not EvalSymlinks.
#
# Needs Go; no root.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
cd "$work"
export CGO_ENABLED=0 GOWORK=off GOFLAGS=-mod=mod

cat >main.go <<'EOF'
package main

import (
	"fmt"
	"os"

	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"
)

// held is a kubeconfig of which inside is called when ModifyConfig has locked and reads it.
type held struct {
	*clientcmd.PathOptions
	inside func()
}

func (h held) GetStartingConfig() (*api.Config, error) {
	h.inside()
	return h.PathOptions.GetStartingConfig()
}

// write adds a context to the kubeconfig of that name.
func write(name, context string, inside func()) error {
	options := clientcmd.NewDefaultPathOptions()
	options.LoadingRules.ExplicitPath = name
	config, err := options.GetStartingConfig()
	if err != nil {
		return err
	}
	config.Contexts[context] = api.NewContext()
	return clientcmd.ModifyConfig(held{options, inside}, *config, false)
}

func main() {
	if err := clientcmd.WriteToFile(*api.NewConfig(), "config"); err != nil {
		panic(err)
	}
	if err := os.Symlink("config", "link"); err != nil {
		panic(err)
	}
	var same, other error
	if err := write("config", "first", func() {
		same = write("config", "second", func() {})
		other = write("link", "third", func() {})
	}); err != nil {
		panic(err)
	}
	fmt.Println("while one writer has config locked:")
	fmt.Println("  a writer to config:", same)
	fmt.Println("  a writer to link -> config:", other)
	if same == nil || other != nil {
		fmt.Println("CHANGED")
		os.Exit(1)
	}
	fmt.Println("as described")
}
EOF
go mod init finding >/dev/null 2>&1
go get k8s.io/client-go@v0.36.3 >log 2>&1 || { cat log; exit 1; }
go build -o finding .
go list -m k8s.io/client-go
HOME=$work ./finding
