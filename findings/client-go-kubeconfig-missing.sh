#!/bin/sh
# Of several files in KUBECONFIG none of which exists, one half of clientcmd creates the last and the other the first.
#
# Library:  k8s.io/client-go v0.36.3, tools/clientcmd.
# Expected: PathOptions and ClientConfigLoadingRules both are a ConfigAccess, made for the same variable, and agree on
#           GetDefaultFilename, the file that new entries go to.
# Instead:  PathOptions, which is kubectl's, takes the last of the missing files; ClientConfigLoadingRules, with which
#           programs load a kubeconfig, the first. If one of the files exists, both take that one.
# Known:    `kubectl config --help` tells of the last file. That the other type differs is not documented.
# Means:    two tools that each add a cluster to a fresh KUBECONFIG=a:b write two files; a script that looks for the
#           kubeconfig in the first, or removes the last, loses one of them. A program that writes kubeconfigs should use
#           NewDefaultPathOptions, so as to do as kubectl does.
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
	"path/filepath"

	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"
)

func main() {
	written := map[string]string{}
	for name, access := range map[string]func() clientcmd.ConfigAccess{
		"PathOptions":              func() clientcmd.ConfigAccess { return clientcmd.NewDefaultPathOptions() },
		"ClientConfigLoadingRules": func() clientcmd.ConfigAccess { return clientcmd.NewDefaultClientConfigLoadingRules() },
	} {
		dir, err := os.MkdirTemp(".", "kubeconfigs")
		if err != nil {
			panic(err)
		}
		os.Setenv("KUBECONFIG", filepath.Join(dir, "first")+":"+filepath.Join(dir, "second")+":"+filepath.Join(dir, "last"))
		config := api.NewConfig()
		config.Clusters["lab"] = &api.Cluster{Server: "https://192.0.2.1:6443"}
		if err := clientcmd.ModifyConfig(access(), *config, false); err != nil {
			panic(err)
		}
		files, err := os.ReadDir(dir)
		if err != nil || len(files) != 1 {
			fmt.Println("not shown:", files, err)
			os.Exit(1)
		}
		written[name] = files[0].Name()
	}
	for _, name := range []string{"PathOptions", "ClientConfigLoadingRules"} {
		fmt.Printf("KUBECONFIG=first:second:last, ModifyConfig by %-24s writes %s\n", name, written[name])
	}
	if written["PathOptions"] != "last" || written["ClientConfigLoadingRules"] != "first" {
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
