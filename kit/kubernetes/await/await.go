// Package await has a program wait until its API server is healthy before it begins.
package await

import (
	"context"
	"net/http"
	"strings"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// Healthy returns when the API server of the --kubeconfig among a program's arguments says that it is healthy, and
// after the limit in any case: it gives no error, since whatever keeps it from asking is met by the program itself.
//
// The controller manager has such a wait, which asks each whole second (WaitForAPIServer in
// k8s.io/controller-manager/app). Every pod of a cluster that starts waits for its controllers, and that second is
// an eighth of the whole start. The scheduler has none, and what it is refused it asks for again a second later or two. Both
// can so be started while the API server still makes the roles that they need.
func Healthy(args []string, limit, pause time.Duration) {
	config, err := clientcmd.BuildConfigFromFlags("", flagValue(args, "kubeconfig"))
	if err != nil {
		return
	}
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	for !healthy(ctx, client, config.Host+"/healthz") {
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

func healthy(ctx context.Context, client *http.Client, url string) bool {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return false
	}
	resp, err := client.Do(req)
	if err != nil {
		return false
	}
	resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

// flagValue is the value of a flag that is written --name=value or --name value, and empty without it.
func flagValue(args []string, name string) string {
	for i, arg := range args {
		if value, ok := strings.CutPrefix(arg, "--"+name+"="); ok {
			return value
		}
		if arg == "--"+name && i+1 < len(args) {
			return args[i+1]
		}
	}
	return ""
}
