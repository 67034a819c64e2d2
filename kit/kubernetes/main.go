// Command kube is Kubernetes' own programs, and etcd, in one executable. It is each of them when called by
// its name (etcd, kube-apiserver, kube-controller-manager, kube-scheduler, kubelet, kube-proxy, kubectl,
// kubeadm), or as `kube NAME`. `kube etcd-state` is Fathom's own (package etcdstate).
//
// The programs share nine tenths of their code: together they are a third of the size and of the
// link time of eight executables, and nodes that run several of them share the pages of one file.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
	_ "time/tzdata" // CronJobs have time zones, and a node's root file system need not

	"github.com/fathom-network/fathom/kit/kubernetes/await"
	"github.com/fathom-network/fathom/kit/kubernetes/etcdstate"
	_ "github.com/fathom-network/fathom/kit/kubernetes/start" // before what follows: its import path decides
	"go.etcd.io/etcd/server/v3/etcdmain"
	_ "k8s.io/client-go/plugin/pkg/client/auth" // kubectl's client auth plugins
	"k8s.io/component-base/cli"
	"k8s.io/component-base/logs"
	_ "k8s.io/component-base/logs/json/register"          // --logging-format=json
	_ "k8s.io/component-base/metrics/prometheus/clientgo" // client-go's metrics
	_ "k8s.io/component-base/metrics/prometheus/version"  // the version metric
	kubectl "k8s.io/kubectl/pkg/cmd"
	kubectlutil "k8s.io/kubectl/pkg/cmd/util"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllermanager "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	proxy "k8s.io/kubernetes/cmd/kube-proxy/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	kubeadm "k8s.io/kubernetes/cmd/kubeadm/app"
	kubeadmerrors "k8s.io/kubernetes/cmd/kubeadm/app/util/errors"
	kubelet "k8s.io/kubernetes/cmd/kubelet/app"
)

// programs holds for each name what the program's own main does upstream.
var programs = map[string]func(){
	"etcd":                    func() { etcdmain.Main(os.Args) },
	"etcd-state":              runEtcdState,
	"kube-apiserver":          func() { os.Exit(cli.Run(apiserver.NewAPIServerCommand())) },
	"kube-controller-manager": runControllerManager,
	"kube-proxy":              func() { os.Exit(cli.Run(proxy.NewProxyCommand())) },
	"kube-scheduler":          runScheduler,
	"kubeadm":                 runKubeadm,
	"kubectl":                 runKubectl,
	"kubelet":                 func() { os.Exit(cli.Run(kubelet.NewKubeletCommand(context.Background()))) },
}

func main() {
	program, ok := programs[filepath.Base(os.Args[0])]
	if !ok && len(os.Args) > 1 {
		if program, ok = programs[os.Args[1]]; ok {
			os.Args = os.Args[1:]
		}
	}
	if !ok {
		names := make([]string, 0, len(programs))
		for name := range programs {
			names = append(names, name)
		}
		slices.Sort(names)
		fmt.Fprintf(os.Stderr, "usage: kube PROGRAM [ARGUMENT...]\nor by a link with the name of a program: %s\n", strings.Join(names, ", "))
		os.Exit(2)
	}
	program()
}

// runKubeadm first empties the process-wide flag set. Packages of other programs put flags there when they
// are initialised (cAdvisor's, for the kubelet), and kubeadm lists as its own all that it finds.
func runKubeadm() {
	flag.CommandLine = flag.NewFlagSet(os.Args[0], flag.ExitOnError)
	kubeadmerrors.HandleError(kubeadm.Run())
}

// runControllerManager first waits as upstream's code will, in smaller steps and up to the same limit.
func runControllerManager() {
	await.Healthy(os.Args[1:], 10*time.Second, 25*time.Millisecond)
	os.Exit(cli.Run(controllermanager.NewControllerManagerCommand()))
}

// runScheduler waits as long. Upstream's code does not: a scheduler that the API server does not know the rights of yet
// asks again after a second or two, which in a cluster's start is when it would have been served.
func runScheduler() {
	await.Healthy(os.Args[1:], 10*time.Second, 25*time.Millisecond)
	os.Exit(cli.Run(scheduler.NewSchedulerCommand()))
}

func runEtcdState() {
	if err := etcdstate.Main(os.Args[1:], os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func runKubectl() {
	// Upstream's main does so too: building the command already logs, before the flags are parsed.
	_, _ = logs.GlogSetter(kubectl.GetLogVerbosity(os.Args))
	if err := cli.RunNoErrOutput(kubectl.NewDefaultKubectlCommand()); err != nil {
		kubectlutil.CheckErr(err)
	}
}
