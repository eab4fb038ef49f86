// Serves a vCenter of govmomi's simulator: main HOST:PORT [CERTIFICATE KEY]. Its datastore is the
// directory that is printed; it ends with its standard input.
package main

import (
	"crypto/tls"
	"fmt"
	"io"
	"io/ioutil"
	"log"
	"net/url"
	"os"

	"github.com/vmware/govmomi/simulator"
)

func main() {
	model := simulator.VPX()
	defer model.Remove()
	if err := model.Create(); err != nil {
		log.Fatal(err)
	}
	model.Service.Listen = &url.URL{Host: os.Args[1], User: url.UserPassword("reader", "secret")}
	model.Service.TLS = new(tls.Config)
	if len(os.Args) > 3 {
		pair, err := tls.LoadX509KeyPair(os.Args[2], os.Args[3])
		if err != nil {
			log.Fatal(err)
		}
		model.Service.TLS.Certificates = []tls.Certificate{pair}
	}
	server := model.Service.NewServer()
	defer server.Close()
	for _, entity := range simulator.Map.All("Datastore") {
		store := entity.(*simulator.Datastore)
		fmt.Println(server.URL.Host, store.Name, store.Info.GetDatastoreInfo().Url)
	}
	io.Copy(ioutil.Discard, os.Stdin)
}
